"""The state file of a loop: whole or absent, and only for the same work."""

import os
import time

import pytest
import torch

from suture.errors import CheckpointError, ConfigError
from suture.storage.resume import Resume


def test_a_state_comes_back_as_it_was(tmp_path):
    path = tmp_path / "state.pt"
    assert Resume(path, {"lr": 0.1}).load() is None
    Resume(path, {"lr": 0.1}).save({"values": torch.ones(2), "losses": [1.0]})
    state = Resume(path, {"lr": 0.1}).load()
    assert state is not None
    assert torch.equal(state["values"], torch.ones(2))
    assert state["losses"] == [1.0]


def test_the_state_of_other_work_is_refused(tmp_path):
    Resume(tmp_path / "state.pt", {"lr": 0.1}).save({})
    with pytest.raises(ConfigError, match=r"left by other work: lr was 0.1 and is now 0.2"):
        Resume(tmp_path / "state.pt", {"lr": 0.2}).load()


def test_a_damaged_state_is_refused(tmp_path):
    (tmp_path / "state.pt").write_bytes(b"PK not really")
    with pytest.raises(CheckpointError, match="holds no state to resume from"):
        Resume(tmp_path / "state.pt", {}).load()


def test_saving_waits_for_its_time(tmp_path):
    assert Resume(tmp_path / "state.pt", {}, every=0).due()
    assert not Resume(tmp_path / "state.pt", {}, every=60).due()


def test_what_a_kill_left_is_removed(tmp_path):
    Resume(tmp_path / "state.pt", {}).save({"step": 1})
    for name, age in (("old", 3600), ("new", 0)):
        (tmp_path / f".state.pt.{name}.partial").write_bytes(b"half")
        os.utime(tmp_path / f".state.pt.{name}.partial", (time.time() - age,) * 2)
    assert Resume(tmp_path / "state.pt", {}).load() == {"step": 1}
    assert {path.name for path in tmp_path.iterdir()} == {"state.pt", ".state.pt.new.partial"}
