"""Hub ids: found in the cache or refused in one line; nothing heavy is imported before it is needed."""

import subprocess
import sys

import huggingface_hub
import pytest
from checkpoint_files import assert_same, refused, small_model
from huggingface_hub import errors

from suture.checkpoints import open_checkpoint, save_checkpoint
from suture.errors import CheckpointError


@pytest.fixture
def online(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def _hub(monkeypatch, answer) -> list[dict]:
    """Put `answer(options)` in place of the download; returns the options of every call."""
    calls = []

    def snapshot_download(name, **options):
        calls.append({"name": name, **options})
        return str(answer(options))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def _model(folder):
    (folder / "config.json").write_text("{}")
    save_checkpoint(small_model(), folder / "model.safetensors")
    return folder


def test_a_hub_id_opens_the_model_directory_at_its_revision(online, tmp_path, monkeypatch):
    calls = _hub(monkeypatch, lambda options: _model(tmp_path))
    checkpoint = open_checkpoint("org/clip-vit", revision="v1")
    assert_same(checkpoint, small_model().state_dict())
    assert checkpoint.directory == tmp_path
    assert checkpoint.label == "org/clip-vit"
    (call,) = calls
    assert (call["name"], call["revision"], call["local_files_only"]) == ("org/clip-vit", "v1", False)
    assert "*.bin" not in call["allow_patterns"]


def test_pytorch_weights_are_fetched_only_without_safetensors(online, tmp_path, monkeypatch):
    import torch

    def answer(options):
        if "*.bin" in options["allow_patterns"]:
            torch.save(small_model().state_dict(), tmp_path / "pytorch_model.bin")
        return tmp_path

    calls = _hub(monkeypatch, answer)
    assert_same(open_checkpoint("org/old"), small_model().state_dict())
    assert len(calls) == 2


@pytest.mark.parametrize("value", ["1", "true", "YES"])
def test_offline_only_the_cache_is_looked_at(value, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    calls = _hub(monkeypatch, lambda options: _model(tmp_path))
    open_checkpoint("org/clip-vit")
    assert calls[0]["local_files_only"] is True


def test_offline_and_not_in_the_cache_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    line = refused(open_checkpoint, "org/clip-vit", kind=CheckpointError)
    assert "'org/clip-vit' is not in the hub's cache and HF_HUB_OFFLINE is set" in line


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.RepositoryNotFoundError, "is unknown"),
        (errors.GatedRepoError, "asks for a login"),
        (errors.RevisionNotFoundError, "knows no such revision"),
        (errors.LocalEntryNotFoundError, "could not be reached"),
        (ConnectionError, "could not be reached (ConnectionError)"),
    ],
)
def test_every_failure_of_the_hub_is_one_line(error, message, online, monkeypatch):
    def answer(options):
        raise error.__new__(error)

    _hub(monkeypatch, answer)
    line = refused(open_checkpoint, "org/name", label="mnist", kind=CheckpointError)
    assert line.startswith("'mnist': 'org/name' ")
    assert message in line


def test_a_missing_local_path_is_not_looked_up_on_the_hub(online, tmp_path, monkeypatch):
    calls = _hub(monkeypatch, lambda options: tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for source in ("weights/model.pt", "runs/model", "a/b/c", "/no/such"):
        assert "does not exist" in refused(open_checkpoint, source, kind=CheckpointError)
    assert calls == []


def test_importing_checkpoints_imports_nothing_heavy():
    heavy = ["huggingface_hub", "transformers", "hydra", "safetensors"]
    code = f"import sys, suture.checkpoints; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
