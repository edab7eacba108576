"""The working folder: full disks, damage, other work, and processes that meet."""

import errno
import json
import os

import pytest
import tiny_llama
import torch

import suture
from suture import merge_files
from suture.cli.main import main
from suture.errors import OutputError


@pytest.fixture
def models():
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.w": torch.randn(50, 40, generator=generator) for i in range(6)}
    tuned = [{name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in base.items()} for _ in range(2)]
    return base, tuned


TENSOR = 50 * 40 * 4  # bytes; headers and state files are smaller


class Stopped(Exception):
    pass


def stop_after(monkeypatch, count, error=Stopped):
    """Let the merge write so many tensors, then fail."""
    calls = [0]
    write = os.pwrite

    def pwrite(descriptor, data, offset):
        calls[0] += len(data) == TENSOR
        if calls[0] > count:
            raise error
        return write(descriptor, data, offset)

    monkeypatch.setattr("os.pwrite", pwrite)
    return calls


def folder(tmp_path):
    return tmp_path / ".out.merging"


def same(out, expected):
    found = tiny_llama.tensors(out)
    return all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_merge_goes_on_with_what_is_left(models, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Stopped):
            merge_files(*models, "dare", tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        calls = stop_after(patch, 100)
        merge_files(*models, "dare", tmp_path / "out", threads=1)
        assert calls[0] == 3  # of six tensors
    assert same(tmp_path / "out", suture.merge(*models, "dare"))
    assert not folder(tmp_path).exists()


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(models, tmp_path, monkeypatch, capsys):
    base, tuned = models
    for name, tensors in (("base", base), ("one", tuned[0])):
        suture.save_checkpoint(tensors, tmp_path / f"{name}.safetensors")
    words = [f"base={tmp_path}/base.safetensors", f"models.one={tmp_path}/one.safetensors", f"output={tmp_path}/out"]
    with monkeypatch.context() as patch:
        stop_after(patch, 2, OSError(errno.ENOSPC, "No space left on device"))
        assert main(["merge", *words, "method=task_arithmetic"]) == 2
    told = capsys.readouterr().err
    assert "No space left on device" in told
    assert "the same command then goes on where it stopped" in told
    assert told.count("\n") == 1
    assert main(["merge", *words, "method=task_arithmetic"]) == 0
    assert same(tmp_path / "out", suture.merge(base, {"one": tuned[0]}, "task_arithmetic"))


def test_what_was_damaged_since_is_merged_anew(models, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Stopped):
            merge_files(*models, "ties_merging", tmp_path / "out", threads=1)
    file = folder(tmp_path) / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[1500:1600] = bytes(100)
    file.write_bytes(content)
    (manifest,) = folder(tmp_path).glob("*.jsonl")
    manifest.write_bytes(manifest.read_bytes() + b'{"name": "layers.5')  # a kill in the middle of a line
    merge_files(*models, "ties_merging", tmp_path / "out", threads=1)
    assert same(tmp_path / "out", suture.merge(*models, "ties_merging"))


def test_a_damaged_share_of_another_process_is_found_when_that_share_is_run_again(models, tmp_path):
    merge_files(*models, "dare", tmp_path / "out", shard="1/2")
    lines = (folder(tmp_path) / "1-of-2.jsonl").read_text().splitlines()
    assert json.loads(lines[-1]) == {"synced": True}
    (folder(tmp_path) / "1-of-2.jsonl").write_text("\n".join(lines[:-1]) + "\n")  # a power cut before the end
    merge_files(*models, "dare", tmp_path / "out", shard="2/2")
    assert not (tmp_path / "out").exists()
    merge_files(*models, "dare", tmp_path / "out", shard="1/2")
    assert same(tmp_path / "out", suture.merge(*models, "dare"))


def test_other_work_is_refused_and_says_what_differs(models, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            merge_files(*models, "dare", tmp_path / "out", threads=1)
    with pytest.raises(OutputError, match=r"the beginning of another merge: settings differ. Remedy"):
        merge_files(*models, "dare", tmp_path / "out", density=0.2)


def test_two_processes_cannot_do_the_same_share(models, tmp_path, monkeypatch):
    import fcntl

    merge_files(*models, "dare", tmp_path / "out", shard="1/2")
    with open(folder(tmp_path) / "1-of-2.jsonl") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="is being worked on by another process as 1/2"):
            merge_files(*models, "dare", tmp_path / "out", shard="1/2")


def test_shares_of_different_splits_may_be_mixed(models, tmp_path):
    merge_files(*models, "dare", tmp_path / "out", shard="2/3")
    merge_files(*models, "dare", tmp_path / "out")
    assert same(tmp_path / "out", suture.merge(*models, "dare"))


def test_more_shares_than_tensors_are_no_trouble(models, tmp_path):
    for i in range(1, 9):
        merge_files(*models, "dare", tmp_path / "out", shard=f"{i}/8")
    assert same(tmp_path / "out", suture.merge(*models, "dare"))


def test_an_old_result_stays_until_all_shares_of_the_new_one_are_done(models, tmp_path):
    out = merge_files(*models, "dare", tmp_path / "out")
    options = {"density": 0.2, "overwrite": True}
    merge_files(*models, "dare", out, shard="1/2", **options)
    assert same(out, suture.merge(*models, "dare"))
    merge_files(*models, "dare", out, shard="2/2", **options)
    assert same(out, suture.merge(*models, "dare", density=0.2))
    assert not folder(tmp_path).exists()
