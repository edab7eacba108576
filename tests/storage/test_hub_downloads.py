"""Downloads from a hub that runs on loopback: whole, at a revision, interrupted, and found again offline."""

import os
import subprocess
import sys

import hub_server
import pytest
import torch

from suture.checkpoints import open_checkpoint, save_checkpoint

PROGRAM = "import sys; from suture.checkpoints import open_checkpoint; print(open_checkpoint(sys.argv[1]).directory)"


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_checkpoint({"w": torch.arange(6_500_000.0)}, folder / "model.safetensors")
    return folder


def opened(address, home, name, **more):
    """Open a hub id in a process of its own; the folder, or the one line it failed with."""
    environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", **more}
    command = [sys.executable, "-c", PROGRAM, name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    return done.stdout.strip() if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def test_a_model_is_downloaded_once_and_found_offline_afterwards(repository, tmp_path):
    with hub_server.serving(repository) as (address, hub):
        folder = opened(address, tmp_path / "home", "org/tiny")
        sent = hub.sent
        assert opened(address, tmp_path / "home", "org/tiny") == folder
        assert hub.sent == sent > 26_000_000
    assert torch.equal(open_checkpoint(folder)["w"], torch.arange(6_500_000.0))
    assert opened("http://127.0.0.1:9", tmp_path / "home", "org/tiny", HF_HUB_OFFLINE="1") == folder


def test_a_revision_is_asked_for_by_name_and_an_unknown_one_is_refused(repository, tmp_path):
    with hub_server.serving(repository) as (address, hub):
        opened(address, tmp_path / "home", "org/tiny@v1")
        assert set(hub.revisions) == {"v1"}
        assert "the hub knows no such revision of 'org/tiny'" in opened(address, tmp_path / "home", "org/tiny@unknown")


def test_an_interrupted_download_goes_on_where_it_stopped(repository, tmp_path):
    with hub_server.serving(repository) as (address, hub):
        hub.cut = "model.safetensors"
        folder = opened(address, tmp_path / "home", "org/tiny")
        if "Error" in folder:  # the library may leave it to the next call
            folder = opened(address, tmp_path / "home", "org/tiny")
        assert any(not asked.startswith("bytes=0-") for asked in hub.ranges)
    assert torch.equal(open_checkpoint(folder)["w"], torch.arange(6_500_000.0))


def test_a_hub_that_is_not_there_is_one_line(tmp_path):
    line = opened("http://127.0.0.1:9", tmp_path / "home", "org/tiny")
    assert "'org/tiny' cannot be fetched" in line
