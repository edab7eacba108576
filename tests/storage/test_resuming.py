"""The state file of a loop: whole or absent, and only for the same work."""

import pytest
import torch

from suture.errors import CheckpointError, ConfigError
from suture.storage.atomic import lock
from suture.storage.resume import Resume


def test_a_state_comes_back_as_it_was(tmp_path):
    path = tmp_path / "state.pt"
    assert Resume(path, {"lr": 0.1}).load() is None
    Resume(path, {"lr": 0.1}).save({"values": torch.ones(2), "losses": [1.0]})
    state = Resume(path, {"lr": 0.1}).load()
    assert state is not None
    assert torch.equal(state["values"], torch.ones(2))
    assert state["losses"] == [1.0]


def test_the_time_of_a_loop_adds_up_over_its_processes(tmp_path, monkeypatch):
    clock = iter([100.0, 130.0, 130.0, 500.0, 507.0, 507.0, 900.0])
    monkeypatch.setattr("suture.storage.resume.time.monotonic", lambda: next(clock))
    first = Resume(tmp_path / "state.pt", {})
    assert (first.load(), first.earlier) == (None, 0.0)
    first.save({"step": 1})
    second = Resume(tmp_path / "state.pt", {})
    assert (second.load(), second.earlier) == ({"step": 1}, 30.0)
    second.save({"step": 2})
    assert (second.load(), second.earlier) == ({"step": 2}, 30.0)
    third = Resume(tmp_path / "state.pt", {})
    assert (third.load(), third.earlier) == ({"step": 2}, 37.0)


def test_the_state_of_other_work_is_refused(tmp_path):
    Resume(tmp_path / "state.pt", {"lr": 0.1}).save({})
    with pytest.raises(ConfigError, match=r"left by other work: lr was 0.1 and is now 0.2"):
        Resume(tmp_path / "state.pt", {"lr": 0.2}).load()


@pytest.mark.parametrize("content", [b"", b"PK not really"])
def test_a_damaged_state_is_named_and_set_aside(tmp_path, caplog, content):
    (tmp_path / "state.pt").write_bytes(content)
    assert Resume(tmp_path / "state.pt", {}).load() is None
    assert "state.pt' cannot be read" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt.unreadable"]
    assert (tmp_path / "state.pt.unreadable").read_bytes() == content


def test_a_file_that_holds_something_else_is_refused_and_stays(tmp_path):
    torch.save({"weight": torch.ones(2)}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="holds no state to resume from"):
        Resume(tmp_path / "model.pt", {}).load()
    assert (tmp_path / "model.pt").exists()


def test_saving_waits_for_its_time(tmp_path):
    assert Resume(tmp_path / "state.pt", {}, every=0).due()
    assert not Resume(tmp_path / "state.pt", {}, every=60).due()


def test_what_a_kill_left_is_removed(tmp_path):
    Resume(tmp_path / "state.pt", {}).save({"step": 1})
    for name in ("dead", "alive"):
        (tmp_path / f".state.pt.{name}.partial").write_bytes(b"half")
    with (tmp_path / ".state.pt.alive.partial").open() as file:
        assert lock(file.fileno())
        assert Resume(tmp_path / "state.pt", {}).load() == {"step": 1}
    assert {path.name for path in tmp_path.iterdir()} == {"state.pt", ".state.pt.alive.partial"}
