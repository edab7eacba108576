"""Faults around a merge of files: changing inputs, refusals on the way, damaged state, an input as the output."""

import math
import os

import pytest
import torch
from tiny_llama import tensors

import suture
from suture import merge_files, save_checkpoint
from suture.cli.main import main
from suture.errors import OutputError, SutureError


@pytest.fixture
def files(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.w": torch.randn(50, 40, generator=generator) for i in range(6)}
    for name in ("base", "one", "two"):
        moved = {key: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for key, tensor in base.items()}
        (tmp_path / name).mkdir()
        save_checkpoint(base if name == "base" else moved, tmp_path / name / "model.safetensors")
    return tmp_path / "base", {name: tmp_path / name for name in ("one", "two")}


class Stopped(Exception):
    pass


def fails_at(monkeypatch, number, action):
    """Let `action()` happen at the so-manyth write of a tensor."""
    calls, write = [0], os.pwrite

    def pwrite(descriptor, data, offset):
        calls[0] += len(data) == 50 * 40 * 4
        if calls[0] == number:
            calls[0] += 1
            action()
        return write(descriptor, data, offset)

    monkeypatch.setattr("os.pwrite", pwrite)


def stop():
    raise Stopped


def same(folder, base, models, method, **knobs):
    expected, found = suture.merge(base, models, method, **knobs), tensors(folder)
    return all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_input_that_changes_during_a_merge_is_refused_and_nothing_is_published(files, tmp_path, monkeypatch):
    base, models = files
    changed = dict(suture.open_checkpoint(models["two"]))
    changed = {name: tensor.clone() + 1 for name, tensor in changed.items()}

    def rewrite():
        save_checkpoint(changed, models["two"] / "model.safetensors")

    with monkeypatch.context() as patch:
        fails_at(patch, 3, rewrite)
        with pytest.raises(SutureError, match="two") as refused:
            merge_files(base, models, "task_arithmetic", tmp_path / "out", threads=1)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()
    merge_files(base, models, "task_arithmetic", tmp_path / "out", threads=1)
    assert same(tmp_path / "out", base, models, "task_arithmetic")


def test_a_merge_that_is_refused_for_its_weights_leaves_nothing_that_hinders_the_next(files, tmp_path, capsys):
    base, models = files
    whole = {name: tensor.clone() for name, tensor in suture.open_checkpoint(models["two"]).items()}
    broken = {**whole, "layers.5.w": torch.full((50, 40), math.nan)}
    save_checkpoint(broken, models["two"] / "model.safetensors")
    words = [f"base={base}", *(f"models.{name}={path}" for name, path in models.items()), f"output={tmp_path / 'out'}"]
    assert main(["merge", *words, "method=ties_merging", "method.scope=tensor"]) == 2
    assert "not finite" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "one", "two"]
    save_checkpoint(whole, models["two"] / "model.safetensors")
    assert main(["merge", *words, "method=task_arithmetic"]) == 0
    assert same(tmp_path / "out", base, models, "task_arithmetic")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"thresholds": 1}'], ids=["empty", "torn", "list", "wrong"])
def test_a_damaged_statistic_is_set_aside_and_gathered_anew(files, tmp_path, monkeypatch, content):
    base, models = files
    with monkeypatch.context() as patch:
        fails_at(patch, 3, stop)
        with pytest.raises(Stopped):
            merge_files(base, models, "ties_merging", tmp_path / "out", threads=1)
    (tmp_path / ".out.merging" / "statistic.json").write_bytes(content)
    merge_files(base, models, "ties_merging", tmp_path / "out", threads=1)
    assert same(tmp_path / "out", base, models, "ties_merging")
    assert not (tmp_path / ".out.merging").exists()


def test_a_header_that_was_never_written_is_written_when_the_merge_goes_on(files, tmp_path, monkeypatch):
    base, models = files
    with monkeypatch.context() as patch:
        fails_at(patch, 3, stop)
        with pytest.raises(Stopped):
            merge_files(base, models, "task_arithmetic", tmp_path / "out", threads=1, shard_size=20_000)
    for shard in (tmp_path / ".out.merging").rglob("*.safetensors"):
        with shard.open("r+b") as file:  # as a power cut leaves it: the space is there, the header is not
            file.write(bytes(8 + 64))
    merge_files(base, models, "task_arithmetic", tmp_path / "out", threads=1, shard_size=20_000)
    assert same(tmp_path / "out", base, models, "task_arithmetic")


@pytest.mark.parametrize("output", ["base", "one", ".", "one/inside"])
def test_an_input_is_never_the_output(files, tmp_path, output):
    base, models = files
    if output == "one/inside":
        (tmp_path / output).mkdir()
        (tmp_path / output / "suture_merge.json").write_text('{"versions": {}, "inputs": {}}')
    before = sorted((path, path.stat().st_size) for path in tmp_path.rglob("*"))
    with pytest.raises(OutputError, match="Remedy"):
        merge_files(base, models, "task_arithmetic", tmp_path / output, overwrite=True)
    assert sorted((path, path.stat().st_size) for path in tmp_path.rglob("*")) == before


def test_a_run_never_replaces_what_it_reads(desk, capsys):
    assert main(desk.words("output=first")) == 0
    desk.models["second"] = str(desk.folder / "first" / "model")
    capsys.readouterr()
    assert main(desk.words("output=first", "overwrite=true")) == 2
    assert "an input" in capsys.readouterr().err
    assert (desk.folder / "first" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["ties_merging", "slerp", "model_stock", "karcher", "dare"])
def test_the_memory_ceiling_changes_no_bit(tmp_path, method, dtype):
    generator = torch.Generator().manual_seed(1)
    count = 1 if method == "slerp" else 3
    base = {"w": torch.randn(400, 300, generator=generator, dtype=dtype)}
    models = [{"w": base["w"] + torch.randn(400, 300, generator=generator, dtype=dtype)} for _ in range(count)]
    outputs = []
    for i, memory in enumerate(("70MB", "90MB", "300MB") if method == "ties_merging" else ("12MB", "40MB", "300MB")):
        merge_files(base, models, method, tmp_path / str(i), memory=memory, threads=1 + i)
        outputs.append(tensors(tmp_path / str(i))["w"])
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
