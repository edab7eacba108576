"""A tiny pool of CLIP models on disk, and the words of a run on it."""

import json
import os

import pytest
import torch
import yaml
from tiny_clip import save_tiny_clip

from suture.checkpoints import open_checkpoint, save_checkpoint
from suture.cli.main import main
from suture.storage.resume import Resume

CLASSES = ["zero", "one", "two"]


@pytest.fixture(scope="session")
def shop(tmp_path_factory):
    """A tiny pool of three models and two tasks; tests copy what they damage."""
    folder = tmp_path_factory.mktemp("shop")
    base = save_tiny_clip(folder / "base")
    tensors = dict(open_checkpoint(base))
    generator = torch.Generator().manual_seed(0)
    for name in ("first", "second"):
        tower = {
            k: t + 0.05 * torch.randn(t.shape, generator=generator)
            for k, t in tensors.items()
            if k.startswith("vision_model.") and t.is_floating_point()
        }
        save_checkpoint(tower, folder / f"{name}.safetensors")
        write_idx(folder / "data" / name, generator)
    return folder


def write_idx(folder, generator, count=12):
    folder.mkdir(parents=True)
    for split in ("train", "t10k"):
        pixels = torch.randint(0, 256, (count, 16, 16), generator=generator).to(torch.uint8).numpy().tobytes()
        head = b"".join(size.to_bytes(4, "big") for size in (2051, count, 16, 16))
        (folder / f"{split}-images-idx3-ubyte").write_bytes(head + pixels)
        labels = bytes(i % len(CLASSES) for i in range(count))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(
            b"".join(size.to_bytes(4, "big") for size in (2049, count)) + labels
        )


@pytest.fixture
def desk(shop, tmp_path, monkeypatch):
    """The words of a run on the shop's pool, and a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    return Desk(shop, tmp_path)


class Desk:
    def __init__(self, shop, folder):
        self.folder = folder
        self.models = {"_pretrained_": str(shop / "base")}
        self.models |= {name: str(shop / f"{name}.safetensors") for name in ("first", "second")}
        self.tasks = {
            name: {"source": str(shop / "data" / name), "classnames": CLASSES, "templates": ["a {}."]}
            for name in ("first", "second")
        }

    def words(self, *more, method="ties_merging"):
        (self.folder / "pool.yaml").write_text(yaml.safe_dump({"family": "clip", "models": self.models}))
        (self.folder / "tasks.yaml").write_text(yaml.safe_dump({"tasks": self.tasks}))
        return [f"method={method}", "modelpool=pool.yaml", "taskpool=tasks.yaml", "output=out", *more]

    def replace(self, name, tensors):
        self.models[name] = str(self.folder / f"{name}.safetensors")
        save_checkpoint(tensors, self.models[name])

    def tensors(self, name):
        return {key: tensor.clone() for key, tensor in open_checkpoint(self.models[name]).items()}


def struck_and_resumed(desk, monkeypatch, words, loop, steps):
    """Run whole in `whole`, then again in `out`, struck after some steps of the class `loop` and given once more."""
    assert main([*words, "output=whole"]) == 0
    for state in (desk.folder / "outputs" / "resume").glob("*.pt"):
        state.unlink()
    step, count = loop.step, iter(range(steps))

    def killed(self, *arguments):
        if next(count, None) is None:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(Resume, "due", lambda self: True)
    monkeypatch.setattr(loop, "step", killed)
    assert main(words) == 130
    assert not (desk.folder / "out").exists()
    monkeypatch.setattr(loop, "step", step)
    assert main(words) == 0
    notes = json.loads((desk.folder / "out" / "report.json").read_text())["notes"]
    assert any(f": {steps} steps were done by an earlier run of the same work; the table" in note for note in notes), (
        notes
    )


def refused(capsys, words):
    """Run, expect one line on standard error and exit code 2; returns the line."""
    before = sorted(os.listdir())
    assert main(words) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error, error
    assert error.startswith("suture: ")
    assert set(os.listdir()) <= {*before, "pool.yaml", "tasks.yaml"}
    return error
