"""Decoded inputs are made once, from the files as they are, and a cache that fails costs time only."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import save_tiny_clip

from suture import tasks
from suture.evaluation.input_cache import decoded
from suture.families.clip import Clip
from suture.tasks import Task

NAMES = ("cat", "dog")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SUTURE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "inputs"


@pytest.fixture
def task(tmp_path):
    for i in range(5):
        path = tmp_path / "data" / "test" / NAMES[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    return Task("pets", str(tmp_path / "data"), NAMES, ("a {}.",))


@pytest.fixture
def family(tmp_path):
    return Clip(save_tiny_clip(tmp_path / "clip"))


def files_in(cache):
    """The files of a cache beside the locks of those who fill it."""
    return [path for path in cache.iterdir() if path.suffix != ".lock"]


def counted(family, monkeypatch):
    calls, decode = [], family.decode
    monkeypatch.setattr(family, "decode", lambda *a, **k: calls.append(1) or decode(*a, **k))
    return calls


def test_the_second_time_nothing_is_decoded(task, family, cache, monkeypatch):
    expected, calls = family.decode(tasks.load(task, "test")), counted(family, monkeypatch)
    for _ in range(2):
        assert torch.equal(decoded(family, tasks.load(task, "test")), expected)
    assert len(calls) == 1
    assert len(files_in(cache)) == 1


def test_another_image_in_the_folder_makes_another_file(task, family, cache, tmp_path):
    before = decoded(family, tasks.load(task, "test")).clone()
    Image.new("RGB", (20, 20)).save(tmp_path / "data" / "test" / "dog" / "1.png")
    assert not torch.equal(decoded(family, tasks.load(task, "test")), before)
    assert len(files_in(cache)) == 2


def test_another_processor_makes_another_file(task, family, cache):
    before = decoded(family, tasks.load(task, "test")).clone()
    family.processor.resample = 0 if family.processor.resample else 2
    assert not torch.equal(decoded(family, tasks.load(task, "test")), before)


def test_a_file_cut_short_is_made_again(task, family, cache):
    expected = decoded(family, tasks.load(task, "test")).clone()
    (file,) = files_in(cache)
    file.write_bytes(file.read_bytes()[:-1])
    assert torch.equal(decoded(family, tasks.load(task, "test")), expected)


def test_a_cache_that_cannot_be_written_costs_time_only(task, family, cache, caplog):
    cache.parent.mkdir()
    cache.write_text("in the way")
    assert torch.equal(decoded(family, tasks.load(task, "test")), family.decode(tasks.load(task, "test")))
    assert "held in memory" in caplog.text


def test_a_failure_while_decoding_leaves_no_file(task, family, cache, monkeypatch):
    def fail(*_):
        raise RuntimeError("no")

    monkeypatch.setattr(family, "decode", fail)
    with pytest.raises(RuntimeError):
        decoded(family, tasks.load(task, "test"))
    assert files_in(cache) == []


def test_the_first_images_alone_are_not_kept(task, family, cache):
    images = tasks.load(task, "test").first(2)
    assert decoded(family, images).shape[0] == len(images) == 2
    assert not cache.exists()
