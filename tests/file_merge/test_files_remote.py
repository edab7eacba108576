"""Merges from and to addresses: bytes equal to those of local files, read by ranges, visible when whole."""

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

import pytest
import torch

from suture import merge_files, open_checkpoint, save_checkpoint
from suture.checkpoints.provenance import PROVENANCE
from suture.cli.main import main
from suture.errors import CheckpointError, ConfigError, OutputError
from suture.storage import remote
from suture.storage.remote import BLOCKS, RangedFile, RemotePath

fsspec = pytest.importorskip("fsspec")
NAMES = ("base", "one", "two")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(remote, "_FIRST_WAIT", 0.001)
    yield
    BLOCKS.limit(1 << 26)


@pytest.fixture
def folders(tmp_path):
    """Three small models of several tensors, one of them tied, as model directories."""
    generator = torch.Generator().manual_seed(0)
    for name in NAMES:
        folder = tmp_path / name
        folder.mkdir()
        tensors = {f"layer.{i}.weight": torch.randn(64, 48, generator=generator) for i in range(5)}
        save_checkpoint(tensors | {"steps": torch.tensor([3])}, folder / "model.safetensors")
        (folder / "config.json").write_text('{"model_type": "tiny"}')
    return tmp_path


@pytest.fixture
def memory(folders):
    """The same models in fsspec's memory."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    for name in NAMES:
        system.put(str(folders / name), f"/{name}", recursive=True)
    return system


def local(folders, **more):
    models = {name: folders / name for name in NAMES[1:]}
    return merge_files(folders / "base", models, "ties_merging", folders / "local", **more)


def addressed(root, output, **more):
    models = {name: f"{root}/{name}" for name in NAMES[1:]}
    return merge_files(f"{root}/base", models, "ties_merging", output, **more)


def test_a_checkpoint_at_an_address_is_the_one_on_disk(folders, memory):
    there, here = open_checkpoint("memory://base"), open_checkpoint(folders / "base")
    assert list(there) == list(here)
    assert all(torch.equal(there[name], here[name]) for name in here)
    assert torch.equal(there.flat("layer.1.weight")[100:1000], here["layer.1.weight"].reshape(-1)[100:1000])


def test_a_merge_from_addresses_to_an_address_has_the_same_bytes(folders, memory):
    here = local(folders, shard_size="30kB")
    there = addressed("memory:/", "memory://merged", shard_size="30kB")
    assert str(there) == "memory://merged"
    for file in here.glob("model*"):
        assert memory.cat_file(f"/merged/{file.name}") == file.read_bytes()
    names = {path.rsplit("/", 1)[-1] for path in memory.ls("/merged", detail=False)}
    assert names == {file.name for file in here.iterdir()}
    assert not list((folders / "cache").rglob("*.safetensors"))


def test_only_the_blocks_that_are_needed_are_read(folders, memory, monkeypatch):
    asked = []
    original = RemotePath.range
    monkeypatch.setattr(RemotePath, "range", lambda self, a, b: (asked.append(b - a), original(self, a, b))[1])
    BLOCKS.limit(1 << 21)
    whole = open_checkpoint("memory://one")
    assert asked == []
    whole["layer.2.weight"]
    assert 0 < sum(asked) <= 2 * BLOCKS.size
    assert len(BLOCKS._held) <= BLOCKS.count


@pytest.fixture
def asked(memory, monkeypatch):
    """The ranges that were asked for, of files of 400 kB in memory."""
    ranges, read = [], RemotePath.range

    def watched(path, begin, end):
        ranges.append((path.name, begin))
        return read(path, begin, end)

    monkeypatch.setattr(RemotePath, "range", watched)
    for name in "abcdef":
        memory.pipe_file(f"/{name}", bytes(range(256)) * 1600)
    return ranges


def test_files_that_are_read_side_by_side_are_asked_for_once(asked):
    files = [RangedFile(RemotePath(f"memory://{name}"), 409_600) for name in "abcdef"]
    BLOCKS.limit(18 * 65_536, streams=6)
    pieces = [[file.tensor(at, 12_800, torch.uint8) for file in files] for at in range(0, 409_600, 12_800)]
    for parts in zip(*pieces, strict=True):
        assert torch.equal(torch.cat(parts), torch.arange(256).to(torch.uint8).repeat(1600))
    assert len(asked) == len(set(asked)) == 6 * 7
    assert BLOCKS.size == 65_536


def test_the_next_block_is_asked_for_before_it_is_wanted(asked, monkeypatch):
    file, arrived = RangedFile(RemotePath("memory://a"), 409_600), threading.Event()
    BLOCKS.limit(18 * 65_536, streams=6)
    watched = RemotePath.range

    def telling(path, begin, end):
        data = watched(path, begin, end)
        if begin == 2 * 65_536:
            arrived.set()
        return data

    monkeypatch.setattr(RemotePath, "range", telling)
    file.tensor(0, 1, torch.uint8)
    file.tensor(65_536, 1, torch.uint8)
    assert arrived.wait(10)
    assert sorted(asked) == [("a", 0), ("a", 65_536), ("a", 131_072)]
    file.tensor(131_072, 1, torch.uint8)
    assert asked.count(("a", 131_072)) == 1


def test_a_block_that_could_not_be_read_ahead_is_asked_for_again(asked, monkeypatch):
    file, failed = RangedFile(RemotePath("memory://a"), 409_600), threading.Event()
    BLOCKS.limit(18 * 65_536, streams=6)
    watched = RemotePath.range

    def failing(path, begin, end):
        if begin == 131_072 and not failed.is_set():
            failed.set()
            raise CheckpointError("gone")
        return watched(path, begin, end)

    monkeypatch.setattr(RemotePath, "range", failing)
    file.tensor(0, 1, torch.uint8)
    assert file.tensor(65_536, 1, torch.uint8).item() == 0
    assert failed.wait(10)
    with suppress(CheckpointError):  # of a reader that comes before it is forgotten
        file.tensor(131_072, 1, torch.uint8)
    assert file.tensor(131_073, 1, torch.uint8).item() == 1


def test_a_result_that_is_there_is_not_made_again(folders, memory, monkeypatch):
    addressed("memory:/", "memory://merged")
    monkeypatch.setattr(RemotePath, "send", lambda *arguments: pytest.fail("sent again"))
    addressed("memory:/", "memory://merged")


def test_what_is_there_is_replaced_only_when_asked(folders, memory):
    addressed("memory:/", "memory://merged", shard_size="30kB")
    with pytest.raises(OutputError, match="exists already"):
        addressed("memory:/", "memory://merged", scaling_factor=0.5)
    addressed("memory:/", "memory://merged", scaling_factor=0.5, overwrite=True)
    assert "model.safetensors" in {path.rsplit("/", 1)[-1] for path in memory.ls("/merged", detail=False)}
    assert not [path for path in memory.ls("/merged", detail=False) if "-of-" in path]
    assert json.loads(memory.cat_file(f"/merged/{PROVENANCE}"))["work"]["settings"]["scaling_factor"] == 0.5


def test_other_files_stay(folders, memory):
    memory.pipe_file("/merged/notes.txt", b"mine")
    with pytest.raises(OutputError, match="holds other files"):
        addressed("memory:/", "memory://merged")
    memory.pipe_file("/merged/model.safetensors", b"mine too")
    with pytest.raises(OutputError, match="no result of a merge"):
        addressed("memory:/", "memory://merged", overwrite=True)


def test_sending_that_breaks_off_goes_on_and_shows_no_model_before(folders, memory, monkeypatch):
    original, sent = RemotePath.send, []

    def send(self, file):
        if len(sent) == 3:
            raise OutputError("broken")
        sent.append(self.name)
        original(self, file)

    monkeypatch.setattr(RemotePath, "send", send)
    with pytest.raises(OutputError, match="broken"):
        addressed("memory:/", "memory://merged", shard_size="30kB")
    with pytest.raises(CheckpointError):
        open_checkpoint("memory://merged")
    first = list(sent)
    monkeypatch.setattr(RemotePath, "send", lambda self, file: (sent.append(self.name), original(self, file))[1])
    addressed("memory:/", "memory://merged", shard_size="30kB")
    assert len(sent) == len(set(sent))
    assert sent[: len(first)] == first
    assert sent[-1] == "model.safetensors.index.json"


def test_a_file_that_changes_during_the_merge_is_refused(folders, memory, monkeypatch):
    from suture.file_merge.job import Job

    original = Job._merge_share

    def changed(self):
        original(self)
        memory.pipe_file("/one/model.safetensors", memory.cat_file("/one/model.safetensors") + b" ")

    monkeypatch.setattr(Job, "_merge_share", changed)
    with pytest.raises(CheckpointError, match="changed while it was merged"):
        addressed("memory:/", "memory://merged")


def test_what_breaks_off_is_asked_for_again_and_refused_in_the_end(folders, memory, monkeypatch):
    system, left = type(memory), [2]
    original = system.cat_file

    def cat_file(self, path, start=None, end=None, **more):
        data = original(self, path, start, end, **more)
        if start and left[0]:
            left[0] -= 1
            return data[:-1]
        return data

    monkeypatch.setattr(system, "cat_file", cat_file)
    assert torch.equal(
        open_checkpoint("memory://one")["layer.0.weight"], open_checkpoint(folders / "one")["layer.0.weight"]
    )
    BLOCKS.limit(1 << 26)
    monkeypatch.setattr(system, "cat_file", lambda *arguments, **more: (_ for _ in ()).throw(ConnectionError("gone")))
    with pytest.raises(CheckpointError, match=r"gone.*Remedy"):
        open_checkpoint("memory://one")["layer.0.weight"]


def test_addresses_that_cannot_be_read_are_refused_in_one_line(memory):
    memory.pipe_file("/weights/model.pt", b"\x80\x02not safetensors")
    for address, message in {
        "memory://nowhere": "does not exist",
        "nothing://a/b": "Remedy",
        "memory://weights/model.pt": "download it first",
    }.items():
        with pytest.raises((CheckpointError, ConfigError), match=message) as error:
            open_checkpoint(address)
        assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def store():
    pytest.importorskip("s3fs", reason="pip install 'suture[remote]'")
    pytest.importorskip("moto", reason="pip install 'moto[server]'")
    from object_store import serving

    with serving() as running:
        yield running


@pytest.fixture
def bucket(store, folders, monkeypatch):
    """The same models in a bucket of an S3 server on loopback."""
    import s3fs

    values = {"AWS_ENDPOINT_URL": store.address, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    for key, value in (values | {"AWS_DEFAULT_REGION": "us-east-1"}).items():
        monkeypatch.setenv(key, value)
    s3fs.S3FileSystem.clear_instance_cache()
    remote._file_system.cache_clear()
    system = s3fs.S3FileSystem()
    name = f"b{abs(hash(folders))}"
    system.mkdir(name)
    for model in NAMES:
        system.put(str(folders / model), f"{name}/{model}", recursive=True)
    store.ranges.clear()
    store.sent, store.stop_at = 0, None
    return f"s3://{name}"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_s3_in_and_out_has_the_same_bytes_through_cuts_and_throttling(folders, bucket, store):
    import s3fs

    here = local(folders, shard_size="30kB")
    store.cut, store.slow = 3, 3
    inputs = [f"base={bucket}/base", *(f"models.{name}={bucket}/{name}" for name in NAMES[1:])]
    assert main(["merge", *inputs, "method=ties_merging", f"output={bucket}/merged", "shard_size=30kB"]) == 0
    assert (store.cut, store.slow) == (0, 0)
    system = s3fs.S3FileSystem(skip_instance_cache=True)
    for file in here.glob("model*"):
        assert system.cat_file(f"{bucket}/merged/{file.name}") == file.read_bytes()
    assert store.ranges


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_large_file_is_sent_in_small_parts(bucket, store, tmp_path):
    (tmp_path / "large").write_bytes(bytes(range(250)) * 80_000)  # 20 MB
    before = store.sent
    there = RemotePath(f"{bucket}/large")
    there.send(tmp_path / "large")
    assert store.sent - before == 3  # of 8 MB, so that not all of the file is in memory
    assert there.stat().st_size == 20_000_000
    assert there.range(16_777_000, 16_777_250) == bytes(range(250))


def test_a_killed_writer_leaves_no_model_in_s3_and_the_next_finishes(folders, bucket, store, tmp_path):
    words = ["merge", f"base={bucket}/base", *(f"models.{n}={bucket}/{n}" for n in NAMES[1:]), "method=ties_merging"]
    words += [f"output={bucket}/killed", "shard_size=30kB"]
    store.stop_at = 4
    process = subprocess.Popen([sys.executable, "-m", "suture", *words], env=os.environ)
    assert store.stuck.wait(90)
    process.send_signal(signal.SIGKILL)
    process.wait()
    store.stop_at = None
    with pytest.raises(CheckpointError):
        open_checkpoint(f"{bucket}/killed")
    assert main(words) == 0
    here = local(folders, shard_size="30kB")
    merged, wanted = open_checkpoint(f"{bucket}/killed"), open_checkpoint(here)
    assert all(torch.equal(merged[name], wanted[name]) for name in wanted)
