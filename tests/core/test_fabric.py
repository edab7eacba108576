"""The keys of `fabric` that suture adds, and what Fabric may print."""

import logging

import pytest
import torch
from torch import nn

from suture.core.batches import order_kernels
from suture.core.fabric import OneDevice, check_fabric, forks, launch, make_fabric, started_processes
from suture.errors import ConfigError
from suture.pipeline.config import compose
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
    assert on.resume("final", str(tmp_path), {}).path != off.resume("final", str(tmp_path), {}).path
    assert OneDevice({"tf32": True}).precision == "32-true with TF32"


@pytest.mark.parametrize("key", ["tf32", "channels_last"])
def test_a_wrong_value_is_refused(key):
    with pytest.raises(ConfigError, match=rf"fabric\.{key}=yes: wanted true or false"):
        check_fabric({key: "yes"})


@pytest.mark.parametrize("key", ["tf32", "channels_last"])
def test_a_command_takes_the_keys(key):
    assert compose([f"fabric.{key}=true", "method=simple_average", "modelpool=glyphs8"])["fabric"][key] is True


def test_convolutions_see_pictures_with_channels_last_where_the_keys_say_so(tmp_path):
    seen = []

    class Convolution(nn.Conv2d):
        def forward(self, input):
            seen.append(input.is_contiguous(memory_format=torch.channels_last))
            return super().forward(input)

    module, pictures = nn.Sequential(Convolution(3, 8, 3), nn.Flatten()), torch.randn(5, 3, 9, 9)
    plain, ordered = (OneDevice({"accelerator": "cpu", "channels_last": on}) for on in (False, True))
    torch.testing.assert_close(ordered.call(module, pictures), plain.call(module, pictures))
    assert seen == [True, False]
    assert torch.equal(ordered.call(nn.Flatten(), pictures), pictures.flatten(1))
    assert ordered.precision == "32-true, channels last"
    note = "Pictures and kernels had their channels last (fabric.channels_last=true)."
    assert Context(tmp_path, fabric=ordered.config).notes() == [note]


def test_kernels_follow_the_order_of_pictures_once_and_keep_it():
    kernels = nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 4, 2)
    module, pictures = nn.Sequential(*kernels, nn.ReLU(), nn.Linear(9, 2)), torch.randn(5, 3, 10, 10)
    device = OneDevice({"accelerator": "cpu", "channels_last": True})
    plain, state = module(pictures), {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert order_kernels(module) is module
    ordered = lambda: [kernel.weight.is_contiguous(memory_format=torch.channels_last) for kernel in kernels]
    assert ordered() == [True, True]
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    torch.testing.assert_close(device.call(module, pictures), plain)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(2 * state[name])
    assert ordered() == [True, True]


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


SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "merge", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
STARTED = [
    ({}, None),
    ({**SLURM, "SLURM_NTASKS": "1"}, None),
    ({**SLURM, "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4"}, 4),
    ({**SLURM, "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, None),
    ({"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "3"}, 3),
]


@pytest.fixture
def started_in(monkeypatch):
    """Sets the variables of torchrun or Slurm."""
    return lambda variables: [monkeypatch.setenv(name, value) for name, value in variables.items()]


@pytest.mark.parametrize(("variables", "count"), STARTED)
def test_a_command_of_one_process_forks_in_a_job_of_slurm_too(variables, count, started_in):
    started_in(variables)
    assert started_processes() == count
    assert forks({}) == (count is None)


@pytest.mark.parametrize("keys", [{"devices": 2}, {"devices": 2, "strategy": "fsdp"}, {"devices": 1}])
def test_the_processes_of_a_job_with_one_task_are_as_many_as_the_keys_say(keys, started_in):
    started_in({**SLURM, "SLURM_NTASKS": "1"})
    result = launch(make_fabric({"accelerator": "cpu", **keys}), lambda f: torch.tensor(f.world_size))
    assert int(result) == keys["devices"]
