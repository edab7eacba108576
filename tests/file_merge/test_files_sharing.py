"""The pass over the whole model that processes share: each block once, whoever comes first, whoever dies."""

import fcntl
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiny_llama
import torch

from suture import merge, merge_files
from suture.file_merge import workspace
from suture.file_merge.job import Job
from suture.file_merge.workspace import WorkingFolder
from suture.merging.task_vectors import RowStream


@pytest.fixture
def models():
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.w": torch.randn(300, 200, generator=generator) for i in range(40)}
    noisy = lambda t: t + 0.1 * torch.randn(t.shape, generator=generator)
    return base, [{name: noisy(t) for name, t in base.items()} for _ in range(2)]


class Stopped(Exception):
    pass


@pytest.fixture
def counted(monkeypatch):
    """The names of the tensors that were counted, in all passes."""
    names, each = [], RowStream.each

    def spy(self, function):
        names.extend(self.names)
        each(self, function)

    monkeypatch.setattr(RowStream, "each", spy)
    return names


def same(out, expected):
    found = tiny_llama.tensors(out)
    return all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_pass_that_one_process_began_is_finished_by_another(models, tmp_path, monkeypatch, counted):
    save, calls = np.savez_compressed, []

    def stop(file, *arrays):
        calls.append(file)
        if len(calls) > 5:
            raise Stopped
        save(file, *arrays)

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez_compressed", stop)
        with pytest.raises(Stopped):
            merge_files(*models, "ties_merging", tmp_path / "out", shard="1/2")
    before = len(counted)
    for shard in ("2/2", "1/2"):
        merge_files(*models, "ties_merging", tmp_path / "out", shard=shard)
    assert len(set(counted[:before])) + len(counted[before:]) <= len(models[0]) + 3  # a block of 3 was interrupted
    assert set(counted) == set(models[0])
    assert same(tmp_path / "out", merge(*models, "ties_merging"))


def test_the_thresholds_are_found_once_for_all_shares(models, tmp_path, counted):
    for i in (1, 2, 3):
        merge_files(*models, "ties_merging", tmp_path / "out", shard=f"{i}/3", threshold=5)
    assert sorted(counted) == sorted(models[0])
    assert same(tmp_path / "out", merge(*models, "ties_merging", threshold=5))


def working_folder(tmp_path):
    folder = WorkingFolder(tmp_path / "out", [])
    folder.path.mkdir()
    return folder


@pytest.mark.parametrize(
    "moment",
    [(Job, "_already_there"), (Job, "_check"), (WorkingFolder, "_lock"), (workspace, "lock")],
    ids=lambda moment: moment[1],
)
def test_a_share_with_nothing_to_do_may_come_at_any_moment(moment, tmp_path, monkeypatch):
    """A model of one tensor: the first of two shares publishes the result while the second begins."""
    one = {"weight": torch.arange(6.0)}
    owner, name = moment
    begin = getattr(owner, name)

    def first_the_other(*args, **kwargs):
        monkeypatch.setattr(owner, name, begin)
        merge_files(one, [one], "simple_average", tmp_path / "out", shard="1/2")
        return begin(*args, **kwargs)

    monkeypatch.setattr(owner, name, first_the_other)
    merge_files(one, [one], "simple_average", tmp_path / "out", shard="2/2")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_shares_that_end_at_once_leave_nothing_behind(tmp_path):
    one = {f"weight.{i}": torch.arange(6.0) for i in range(3)}
    for round_ in range(15):
        out = tmp_path / str(round_) / "out"
        share = lambda shard, out=out: merge_files(one, [one], "simple_average", out, shard=shard, threads=1)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(share, ["1/4", "2/4", "3/4", "4/4"]))
        assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("dies", [False, True], ids=["finishes", "dies"])
def test_what_another_process_has_in_the_making_is_left_for_last(tmp_path, dies):
    folder, made = working_folder(tmp_path), []

    def make(name):
        made.append(name)
        return b"mine"

    with open(folder.path / "a.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        waiting = threading.Thread(target=folder.once, args=(["a", "b", "c"], make))
        waiting.start()
        while not (folder.path / "c").exists():
            assert waiting.is_alive()
        assert made == ["b", "c"]
        if not dies:
            (folder.path / "a").write_text("another's")
    waiting.join(timeout=10)
    assert (folder.path / "a").read_text() == ("mine" if dies else "another's")
    assert made == (["b", "c", "a"] if dies else ["b", "c"])
    assert sorted(path.name for path in Path(folder.path).iterdir() if path.suffix != ".lock") == ["a", "b", "c"]


def test_a_share_that_is_lost_after_it_was_synced_is_merged_again(models, tmp_path):
    """As if a power cut had taken the folder with the tensors and left the lines that say that they are there."""
    out = tmp_path / "out"
    merge_files(*models, "ties_merging", out, shard="1/2")
    shutil.rmtree(tmp_path / ".out.merging" / "model")
    merge_files(*models, "ties_merging", out, shard="2/2")
    assert not out.exists()
    merge_files(*models, "ties_merging", out, shard="1/2")
    assert same(out, merge(*models, "ties_merging"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_line_that_was_never_synced_does_not_count_with_later_ones(models, tmp_path):
    merge_files(*models, "ties_merging", tmp_path / "out", shard="1/2")
    lines = tmp_path / ".out.merging" / "1-of-2.jsonl"
    records = [line for line in lines.read_text().splitlines() if "synced" not in line]
    lines.write_text("\n".join([*records, '{"synced": false}', records[0], '{"synced": true}', ""]))
    merge_files(*models, "ties_merging", tmp_path / "out", shard="2/2")
    assert not (tmp_path / "out").exists()
    merge_files(*models, "ties_merging", tmp_path / "out", shard="1/2")
    assert same(tmp_path / "out", merge(*models, "ties_merging"))
