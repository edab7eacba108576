"""Hashes of what went in, remembered between runs."""

import hashlib
import json
import os
import time
from pathlib import Path

import pytest
import torch
from checkpoint_files import refused, small_model

from suture.checkpoints import content_hash, file_sha256, open_checkpoint, provenance_of, save_checkpoint
from suture.errors import CheckpointError
from suture.storage.cache import cache_directory


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SUTURE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _old_file(folder: Path, content: bytes = b"weights", age: int = 100) -> Path:
    path = folder / "x.bin"
    path.write_bytes(content)
    then = time.time_ns() - age * 10**9
    os.utime(path, ns=(then, then))
    return path


def test_the_cache_directory_follows_the_environment(monkeypatch):
    monkeypatch.setenv("SUTURE_CACHE", "here")
    assert cache_directory() == Path("here")
    monkeypatch.delenv("SUTURE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "there")
    assert cache_directory() == Path("there/suture")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache" / "suture"


def test_a_file_is_hashed_once_while_it_is_unchanged(cache, tmp_path, monkeypatch):
    path = _old_file(tmp_path)
    wanted = hashlib.sha256(b"weights").hexdigest()
    assert file_sha256(path) == wanted
    monkeypatch.setattr(hashlib, "file_digest", None)
    assert file_sha256(path) == wanted


@pytest.mark.parametrize(("content", "age"), [(b"weights", 50), (b"other weights", 100)])
def test_a_changed_file_is_hashed_anew(content, age, cache, tmp_path):
    file_sha256(_old_file(tmp_path))
    path = _old_file(tmp_path, content, age)
    assert file_sha256(path) == hashlib.sha256(content).hexdigest()


def test_a_file_written_just_now_is_not_remembered(cache, tmp_path):
    file_sha256(_old_file(tmp_path, age=0))
    assert not (cache / "sha256.json").exists()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": 3}'])
def test_a_damaged_cache_is_made_anew(content, cache, tmp_path):
    cache.mkdir()
    (cache / "sha256.json").write_text(content)
    path = _old_file(tmp_path)
    assert file_sha256(path) == hashlib.sha256(b"weights").hexdigest()
    assert str(path) in json.loads((cache / "sha256.json").read_text())


def test_a_cache_that_cannot_be_written_does_not_matter(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SUTURE_CACHE", str(tmp_path / "file" / "cache"))
    assert file_sha256(_old_file(tmp_path)) == hashlib.sha256(b"weights").hexdigest()


def test_a_missing_file_is_refused(tmp_path):
    assert "cannot be read" in refused(file_sha256, tmp_path / "no", kind=CheckpointError)


def test_the_content_hash_depends_on_names_dtypes_shapes_and_values_only(tmp_path):
    state = {"w": torch.arange(6.0).view(2, 3), "n": torch.tensor(3), "e": torch.zeros(0)}
    wanted = content_hash(state)
    save_checkpoint(state, tmp_path / "x.safetensors")
    assert content_hash(open_checkpoint(tmp_path / "x.safetensors")) == wanted
    assert content_hash(dict(reversed(state.items()))) == wanted
    assert content_hash(state | {"w": state["w"].t().contiguous().t()}) == wanted
    for other in (state["w"] + 1, state["w"].view(3, 2), state["w"].double()):
        assert content_hash(state | {"w": other}) != wanted
    assert content_hash({"v": state["w"]}) != content_hash({"w": state["w"]})


def test_provenance_is_ready_for_json(tmp_path):
    save_checkpoint(small_model(), tmp_path / "x.safetensors")
    models = {"base": open_checkpoint(tmp_path / "x.safetensors"), "mnist": open_checkpoint(small_model())}
    found = json.loads(json.dumps(provenance_of(models)))
    path = str(tmp_path / "x.safetensors")
    assert found["inputs"]["base"]["files"] == {path: file_sha256(path)}
    assert found["inputs"]["mnist"]["sha256"] == content_hash(small_model().state_dict())
    assert found["versions"]["torch"].startswith(torch.__version__.split("+")[0])
