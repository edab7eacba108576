"""The family timm against the real library: both layouts, pictures, a whole run, and the test kit."""

import json

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from suture.checkpoints import open_checkpoint, save_checkpoint
from suture.cli.main import main
from suture.families.testing import check_family
from suture.families.timm import Timm
from suture.pipeline.starting import init
from suture.tasks import Task

CLASSES = {"shade": ("dark", "light"), "hue": ("red", "green", "blue")}
ARCHITECTURE, SIDE = "resnet10t", 64
PICTURE = {"input_size": [3, SIDE, SIDE], "interpolation": "bilinear", "crop_pct": 0.8, "crop_mode": "center"}
PICTURE |= {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "classifier": "fc"}


def model_of(classes, seed=0):
    torch.manual_seed(0)
    model = timm.create_model(ARCHITECTURE, num_classes=classes)
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and seed:
            tensor.add_(0.02 * torch.randn(tensor.shape, generator=generator).abs())
    return model.eval()


def save(model, folder, classes, prefix=""):
    folder.mkdir()
    config = {"architecture": ARCHITECTURE, "num_classes": classes, "pretrained_cfg": PICTURE}
    if prefix:
        config |= {"architectures": ["TimmWrapperForImageClassification"], "model_type": "timm_wrapper"}
    (folder / "config.json").write_text(json.dumps(config))
    state = {prefix + name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_checkpoint(state, folder / "model.safetensors")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("timm")
    save(model_of(10), folder / "base", 10)
    for seed, (name, classes) in enumerate(CLASSES.items(), start=1):
        save(model_of(len(classes), seed), folder / name, len(classes), "timm_model." if name == "hue" else "")
        draw = np.random.default_rng(seed)
        for split in ("train", "test"):
            for label in classes:
                (folder / "data" / name / split / label).mkdir(parents=True)
                for i in range(4):
                    pixels = draw.integers(0, 256, (90, 70, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / "data" / name / split / label / f"{i}.png")
    return folder


def family_of(shelf):
    return Timm(shelf / "base", experts={name: open_checkpoint(shelf / name) for name in CLASSES})


def task_of(shelf, name):
    return Task(name, str(shelf / "data" / name), CLASSES[name])


def test_logits_are_those_of_timm_with_its_own_preparation_of_pictures(shelf):
    family, seed = family_of(shelf), 2
    model = model_of(3, seed)
    model.pretrained_cfg = {**model.pretrained_cfg, **PICTURE}
    prepare = create_transform(**resolve_model_data_config(model), is_training=False)
    picture = Image.open(shelf / "data" / "hue" / "test" / "red" / "0.png").convert("RGB")
    from suture.tasks import Images

    ours = family.decode(Images([picture], torch.zeros(1).long()))
    pixels = prepare(picture)[None]
    with torch.no_grad():
        theirs = model(pixels)
        encoder = family.encoder(open_checkpoint(shelf / "hue"))
        head = family.head(task_of(shelf, "hue"))
        torch.testing.assert_close(head(encoder(pixels)), theirs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(head(encoder(ours)), theirs, rtol=2e-2, atol=2e-2)  # rounding to whole pixel values


def test_a_run_from_two_yamls(shelf, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started = init([shelf], tmp_path)
    assert yaml.safe_load(started.modelpool.read_text())["family"] == "timm"
    words = ["method=task_arithmetic", "modelpool=models.yaml", "taskpool=tasks.yaml", "output=out"]
    assert main(["check", *words]) == 0
    assert main(words) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["samples"] == {"hue": 12, "shade": 8}
    model = model_of(3)
    out = tmp_path / "out" / "model"
    head = open_checkpoint(out / "heads" / "hue.safetensors")
    model.load_state_dict({**open_checkpoint(out), **{f"fc.{name}": head[name] for name in head}})


def test_the_family_passes_the_test_kit(shelf, tmp_path):
    check_family(family_of(shelf), [task_of(shelf, name) for name in CLASSES], tmp_path / "model")
