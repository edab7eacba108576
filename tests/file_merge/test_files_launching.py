"""Merges in shares that are started, watched and started again: the bytes of one process."""

import pytest
import torch

from suture import launch_shares, merge_files, save_checkpoint
from suture.cli.main import main
from suture.errors import ConfigError, OutputError, SutureError
from suture.file_merge.launching import End, LocalLauncher, RayLauncher, SubmititLauncher


@pytest.fixture
def words(tmp_path, monkeypatch):
    """The words of a merge that counts over the whole model."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "one", "two"):
        tensors = {f"layer.{i}.weight": torch.randn(80, 60, generator=generator) for i in range(6)}
        save_checkpoint(tensors, tmp_path / f"{name}.safetensors")
    models = {name: tmp_path / f"{name}.safetensors" for name in ("one", "two")}
    merge_files(tmp_path / "base.safetensors", models, "ties_merging", tmp_path / "alone", shard_size="50kB")
    inputs = [f"base={tmp_path}/base.safetensors", *(f"models.{name}={path}" for name, path in models.items())]
    return [*inputs, "method=ties_merging", f"output={tmp_path}/together", "shard_size=50kB"]


def same_bytes(folder):
    files = sorted((folder / "alone").glob("model*"))
    assert [f.name for f in files] == sorted(f.name for f in (folder / "together").glob("model*"))
    assert all(file.read_bytes() == (folder / "together" / file.name).read_bytes() for file in files)
    assert not list(folder.glob(".*.merging"))


class Deadly(LocalLauncher):
    """Kills the first processes that it starts."""

    def __init__(self, deaths):
        self.deaths, self.started = deaths, []

    def start(self, command):
        share = super().start(command)
        self.started.append(command)
        if len(self.started) <= self.deaths:
            share.process.kill()
        return share


def test_shares_here_have_the_bytes_of_one_process(words, tmp_path, capsys):
    assert main(["merge", *words, "--launcher", "local", "--shards", "3"]) == 0
    assert "The merged model is in" in capsys.readouterr().out
    same_bytes(tmp_path)


def test_a_share_that_dies_is_started_again(words, tmp_path):
    launcher = Deadly(2)
    done = launch_shares([*words, "threads=1"], shards=2, launcher=launcher)
    assert done.restarts == 2
    assert len(launcher.started) == 4
    same_bytes(tmp_path)


def test_a_share_that_dies_again_and_again_is_an_error(words, tmp_path):
    with pytest.raises(OutputError, match=r"Share 1/1 ended with code -9 4 times.*same command"):
        launch_shares(words, shards=1, launcher=Deadly(99))
    assert not (tmp_path / "together").exists()


class Refusing:
    """Every second share is refused; the others run until they are stopped."""

    def __init__(self):
        self.stopped, self.count = 0, 0

    def start(self, command):
        self.count += 1
        return self if self.count % 2 else Ended()

    def end(self):
        return None

    def stop(self):
        self.stopped += 1


class Ended:
    def end(self):
        return End(2, "suture: 'one' is empty. Remedy: download it again.")

    def stop(self):
        raise AssertionError("it has ended")


def test_a_refusal_of_one_stops_all(words):
    launcher = Refusing()
    with pytest.raises(SutureError, match=r"^'one' is empty"):
        launch_shares(words, shards=2, launcher=launcher, pause=0)
    assert launcher.stopped == 1


def test_what_does_not_fit_is_refused_at_once(words):
    for arguments, options, message in (
        (words, {"shards": 0}, "shards=0"),
        ([*words, "shard=1/2"], {"shards": 2}, "shard=1/2 with a launcher"),
        (words, {"shards": 2, "launcher": "abacus"}, "launcher 'abacus'"),
    ):
        with pytest.raises(ConfigError, match=message):
            launch_shares(arguments, **options)
    assert main(["merge", *words, "--shards", "2"]) == 2


@pytest.mark.filterwarnings("ignore")
def test_shares_through_submitit_have_the_bytes_of_one_process(words, tmp_path):
    pytest.importorskip("submitit", reason="pip install 'suture[submitit]'")
    launcher = SubmititLauncher("local", tmp_path / "logs")
    launch_shares([*words, "threads=1"], shards=2, launcher=launcher)
    same_bytes(tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_shares_on_ray_have_the_bytes_of_one_process(words, tmp_path):
    ray = pytest.importorskip("ray", reason="pip install 'suture[ray]'")
    try:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        launch_shares([*words, "threads=1"], shards=2, launcher=RayLauncher())
    finally:
        ray.shutdown()
    same_bytes(tmp_path)
