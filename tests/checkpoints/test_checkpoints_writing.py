"""Results appear whole or not at all."""

import errno
import os
import signal
import subprocess
import sys

import pytest
import safetensors
import safetensors.torch
import torch
from checkpoint_files import assert_same, refused, small_model
from torch import nn

from suture.checkpoints import TensorSpec, allocate_checkpoint, open_checkpoint, save_checkpoint
from suture.errors import CheckpointError, OutputError


def test_what_is_saved_comes_back(tmp_path):
    state = small_model().state_dict() | {"empty": torch.zeros(0, 2), "flag": torch.tensor(True)}
    save_checkpoint(state, tmp_path / "x.safetensors")
    assert_same(open_checkpoint(tmp_path / "x.safetensors"), state)
    assert_same(safetensors.torch.load_file(tmp_path / "x.safetensors"), state)
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_modules_and_checkpoints_are_saved_too(tmp_path):
    model = small_model()
    save_checkpoint(model, tmp_path / "a.safetensors")
    save_checkpoint(open_checkpoint(tmp_path / "a.safetensors"), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert_same(open_checkpoint(tmp_path / "b.safetensors"), model.state_dict())


def test_tied_names_are_written_once_and_come_back(tmp_path):
    shared = torch.randn(100, 100)
    save_checkpoint({"z": shared, "a": shared, "b": shared.clone()}, tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors").stat().st_size < 2.1 * shared.nbytes
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    assert checkpoint.aliases == {"z": "a"}
    assert_same(checkpoint, {"z": shared, "a": shared, "b": shared})


def test_views_transposed_and_overlapping_are_written_as_separate_tensors(tmp_path):
    storage = torch.arange(12.0)
    state = {"a": storage[:8], "b": storage[4:], "t": storage.view(3, 4).t(), "e": torch.ones(1).expand(3)}
    save_checkpoint(state, tmp_path / "x.safetensors")
    assert_same(open_checkpoint(tmp_path / "x.safetensors"), state)


def test_the_format_is_what_other_libraries_expect(tmp_path):
    save_checkpoint({"w": torch.ones(2)}, tmp_path / "x.safetensors", {"task": "mnist"})
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "task": "mnist"}


def test_tensors_of_all_widths_are_aligned_in_the_file(tmp_path):
    state = {
        "a": torch.ones(3, dtype=torch.uint8),
        "b": torch.ones(1, dtype=torch.float64),
        "c": torch.ones(1).half(),
    }
    save_checkpoint(state, tmp_path / "x.safetensors")
    for tensor in open_checkpoint(tmp_path / "x.safetensors").values():
        assert tensor.data_ptr() % tensor.itemsize == 0


def test_a_checkpoint_can_be_saved_over_itself(tmp_path):
    state = small_model().state_dict()
    save_checkpoint(state, tmp_path / "x.safetensors")
    save_checkpoint(open_checkpoint(tmp_path / "x.safetensors"), tmp_path / "x.safetensors")
    assert_same(open_checkpoint(tmp_path / "x.safetensors"), state)


def test_an_allocated_file_is_filled_in_place(tmp_path):
    specs = {"w": TensorSpec((2, 3), torch.float16), "n": TensorSpec((), torch.int64)}
    with allocate_checkpoint(specs, tmp_path / "x.safetensors", aliases={"v": "w"}) as tensors:
        tensors["w"].copy_(torch.arange(6).view(2, 3))
        tensors["n"].fill_(7)
        assert tensors["v"] is tensors["w"]
        assert not (tmp_path / "x.safetensors").exists()
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    assert checkpoint["v"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert checkpoint["n"].item() == 7


def test_an_error_midway_leaves_the_old_file_and_nothing_else(tmp_path):
    save_checkpoint({"w": torch.ones(2)}, tmp_path / "x.safetensors")
    with (
        pytest.raises(RuntimeError, match="midway"),
        allocate_checkpoint({"w": TensorSpec((9,), torch.float32)}, tmp_path / "x.safetensors"),
    ):
        raise RuntimeError("midway")
    assert os.listdir(tmp_path) == ["x.safetensors"]
    assert open_checkpoint(tmp_path / "x.safetensors")["w"].tolist() == [1, 1]


def test_what_cannot_be_saved_leaves_nothing(tmp_path):
    refused(save_checkpoint, {"w": "text"}, tmp_path / "new" / "x.safetensors", kind=CheckpointError)
    line = refused(_allocate, {"w": TensorSpec((2,), torch.complex64)}, tmp_path / "new" / "x", kind=OutputError)
    assert "safetensors has no dtype complex64" in line
    assert os.listdir(tmp_path) == []


def _allocate(specs, path) -> None:
    with allocate_checkpoint(specs, path):
        pass


def test_a_full_disk_is_refused_in_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    line = refused(save_checkpoint, {"w": torch.ones(2)}, tmp_path / "new" / "x.safetensors", kind=OutputError)
    assert "cannot be written: No space left on device" in line
    assert os.listdir(tmp_path) == []


_OVER_THE_LIMIT = """
import resource, sys, torch
from suture.checkpoints import save_checkpoint
from suture.errors import OutputError

resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try:
    save_checkpoint({"w": torch.ones(1 << 18)}, sys.argv[1])
except OutputError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs resource limits")
def test_a_file_over_the_limit_is_refused_in_one_line_and_leaves_nothing(tmp_path):
    arguments = [sys.executable, "-c", _OVER_THE_LIMIT, tmp_path / "x.safetensors"]
    result = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert "cannot be written: File too large" in result.stdout
    assert result.stdout.count("\n") == 1
    assert os.listdir(tmp_path) == []


_KILLED = """
import os, signal, sys, torch
from suture.checkpoints import TensorSpec, allocate_checkpoint

with allocate_checkpoint({"w": TensorSpec((2,), torch.float32)}, sys.argv[1]) as tensors:
    tensors["w"].fill_(9)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs signals")
def test_a_kill_midway_leaves_the_old_result_and_a_hidden_leftover(tmp_path):
    path = tmp_path / "model.safetensors"
    save_checkpoint({"w": torch.ones(2)}, path)
    result = subprocess.run([sys.executable, "-c", _KILLED, path])
    assert result.returncode == -signal.SIGKILL
    assert open_checkpoint(tmp_path)["w"].tolist() == [1, 1]
    (leftover,) = set(os.listdir(tmp_path)) - {"model.safetensors"}
    assert leftover.startswith(".")
    assert leftover.endswith(".partial")
    save_checkpoint({"w": torch.ones(2)}, path)
    assert os.listdir(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize("path", ["folder", "file.txt/x.safetensors"])
def test_a_path_that_cannot_be_written_is_refused(path, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.txt").write_text("")
    refused(save_checkpoint, {"w": torch.ones(2)}, tmp_path / path, kind=OutputError)
    assert sorted(os.listdir(tmp_path)) == ["file.txt", "folder"]


def test_the_saved_module_loads_into_a_module(tmp_path):
    model = small_model()
    save_checkpoint(model, tmp_path / "x.safetensors")
    other = small_model(seed=1)
    other.load_state_dict(dict(open_checkpoint(tmp_path / "x.safetensors")))
    assert_same(other.state_dict(), model.state_dict())
    assert isinstance(other, nn.Module)
