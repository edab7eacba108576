"""The keys of `fabric` that suture adds, and what Fabric may print."""

import logging

import pytest
import torch

from suture.core.fabric import OneDevice, check_fabric, launch, make_fabric
from suture.errors import ConfigError
from suture.pipeline.context import Context


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_off_unless_the_keys_turn_it_on(allowed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = not allowed
        make_fabric({"accelerator": "cpu", **({"tf32": True} if allowed else {})})
        assert [switch.allow_tf32 for switch in switches] == [allowed, allowed]
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


def test_a_report_names_tf32_and_states_of_loops_tell_it_apart(tmp_path):
    on, off = (Context(tmp_path, fabric={"accelerator": "cpu", "tf32": value}) for value in (True, False))
    assert on.notes() == ["Products of float32 matrices ran in TF32 (fabric.tf32=true)."]
    assert off.notes() == []
    assert on.resume(str(tmp_path), {}).path != off.resume(str(tmp_path), {}).path
    assert OneDevice({"tf32": True}).precision == "32-true with TF32"


def test_a_wrong_value_is_refused():
    with pytest.raises(ConfigError, match=r"fabric\.tf32=yes: wanted true or false"):
        check_fabric({"tf32": "yes"})


def test_fabric_s_own_notices_do_not_reach_the_user(caplog):
    with caplog.at_level(logging.INFO):
        make_fabric({"accelerator": "cpu", "precision": "bf16-mixed"})
    assert logging.getLogger("lightning_fabric").level == logging.WARNING
    assert "Mixed Precision" not in caplog.text


@pytest.mark.parametrize(
    "keys", [{"devices": 2}, {"devices": 2, "strategy": "fsdp"}, {"devices": 1, "strategy": "fsdp"}]
)
def test_processes_give_back_more_than_a_pipe_holds(keys):
    fabric = make_fabric({"accelerator": "cpu", **keys})
    result = launch(fabric, lambda f: torch.full((100_000,), float(f.world_size)))
    assert torch.equal(result, torch.full((100_000,), float(keys["devices"])))
