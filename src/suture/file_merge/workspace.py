"""The hidden folder beside a result in which it is made: the shards, and a manifest of what is finished.

    .NAME.merging/work.json      what is merged, how: only the same work goes on in it
    .NAME.merging/i-of-n.jsonl   one line for each tensor that a process has finished, with a hash
    .NAME.merging/count-r-b.npz  what several processes count together over the whole model, block by block
    .NAME.merging/model/         the result; it becomes NAME in one step when nothing is missing

A line counts at once for whoever is killed and goes on. For a power cut, which may lose what was written, a line counts
only if a later line of the same file says that all before it has reached the disk; others are checked by their hashes.
"""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from suture.errors import OutputError, output_refusal
from suture.file_merge.layout import Place, Shard
from suture.storage.atomic import allocate, disk_errors, held, lock, put_in_place, sync_directory

_GO_ON = "free some space, or move the folder to another disk; the same command then goes on where it stopped"


@dataclass(frozen=True)
class Finished:
    """A tensor that is written: its votes and waiting slices (see `suture.merge.Votes`), and a hash of its bytes.

    `sha256` is that of the checksums (CRC-32) of its slices of `unit` entries each.
    """

    name: str
    unit: int
    sha256: str
    votes: int = 0
    waiting: Sequence[int] = ()


class Digests:
    """The checksums of a tensor's slices, which are written in any order."""

    def __init__(self):
        self.parts: dict[int, bytes] = {}

    def add(self, start: int, data) -> None:
        """Take the bytes of the slice that starts at an entry."""
        self.parts[start] = zlib.crc32(data).to_bytes(4, "little")

    def hexdigest(self) -> str:
        """One hash for all."""
        return hashlib.sha256(b"".join(self.parts[start] for start in sorted(self.parts))).hexdigest()


@dataclass
class WorkingFolder:
    """The place where one result is made, by one process or by several at once."""

    output: Path
    shards: Sequence[Shard]
    part: tuple[int, int] = (1, 1)
    places: dict[str, Place] = field(init=False)
    _files: dict[str, int] = field(default_factory=dict)
    _manifest: int = -1

    def __post_init__(self):
        self.places = {name: place for shard in self.shards for name, place in shard.places.items()}

    @property
    def path(self) -> Path:
        """The hidden folder."""
        return self.output.absolute().with_name(f".{self.output.absolute().name}.merging")

    @property
    def model(self) -> Path:
        """What becomes the result."""
        return self.path / "model"

    @contextmanager
    def open(self, work: Mapping[str, Any]) -> Iterator[None]:
        """Begin or go on: the shards at their full size, so that a full disk shows now, and this process's manifest."""
        with disk_errors(self.path, _GO_ON):
            self.model.mkdir(parents=True, exist_ok=True)
            self._claim(work)
            try:
                with self.alone():
                    for shard in self.shards:
                        self._files[shard.file] = self._allocated(shard)
                yield
            finally:
                for descriptor in [*self._files.values(), self._manifest]:
                    if descriptor >= 0:
                        os.close(descriptor)
                self._files, self._manifest = {}, -1

    def _claim(self, work: Mapping[str, Any]) -> None:
        told, file = json.dumps(work, indent=1, sort_keys=True), self.path / "work.json"
        if not file.exists():
            partial = file.with_suffix(f".{os.getpid()}")
            partial.write_text(told, "utf-8")
            os.replace(partial, file)
        found = file.read_text("utf-8")
        if found != told:
            raise OutputError(f"'{self.path}' holds the beginning of another merge: {_difference(found, work)}.")
        i, n = self.part
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
        self._manifest = os.open(self.path / f"{i}-of-{n}.jsonl", flags, 0o666)
        if lock(self._manifest) is False:
            problem = f"is being worked on by another process as {i}/{n}"
            raise output_refusal(self.path, problem, "wait for it, or give this one another shard")
        if (
            os.fstat(self._manifest).st_size
            and os.pread(self._manifest, 1, os.fstat(self._manifest).st_size - 1) != b"\n"
        ):
            os.write(self._manifest, b"\n")  # a kill in the middle of a line

    def _allocated(self, shard: Shard) -> int:
        descriptor = os.open(self.model / shard.file, os.O_RDWR | os.O_CREAT, 0o666)
        if os.fstat(descriptor).st_size < shard.size:
            allocate(descriptor, shard.size)
            os.pwrite(descriptor, shard.header, 0)
        return descriptor

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Put bytes at an entry of a tensor."""
        place = self.places[name]
        at, descriptor = place.begin + start * place.spec.dtype.itemsize, self._files[place.file]
        while len(data):
            written = os.pwrite(descriptor, data, at)
            data, at = data[written:], at + written

    def read(self, name: str, start: int, stop: int) -> bytes:
        """The bytes between two entries of a tensor."""
        place = self.places[name]
        size = place.spec.dtype.itemsize
        return os.pread(self._files[place.file], (stop - start) * size, place.begin + start * size)

    def start_writing_out(self, name: str) -> None:
        """Have the disk begin with a tensor that is finished, instead of leaving all to the end."""
        place = self.places[name]
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._files[place.file], place.begin, place.spec.nbytes, os.POSIX_FADV_DONTNEED)

    def record(self, finished: Finished) -> None:
        """Note that a tensor is written."""
        self._append(vars(finished))

    def sync(self) -> None:
        """Make all that is finished last through a power cut, and note that it does."""
        for descriptor in self._files.values():
            os.fsync(descriptor)
        sync_directory(self.model)
        self._append({"synced": True})
        os.fsync(self._manifest)

    def _append(self, line: Mapping[str, Any]) -> None:
        os.write(self._manifest, (json.dumps(line, sort_keys=True) + "\n").encode())

    def finished(self) -> tuple[dict[str, Finished], set[str]]:
        """All tensors that some process has written, and the names of those that are sure to be on the disk."""
        found: dict[str, Finished] = {}
        sure: set[str] = set()
        for manifest in sorted(self.path.glob("*-of-*.jsonl")):
            fresh: set[str] = set()
            for line in _lines(manifest):
                if line.get("synced"):
                    sure |= fresh
                    fresh = set()
                elif line.get("name") in self.places:
                    found[line["name"]] = Finished(**line)
                    sure.discard(line["name"])
                    fresh.add(line["name"])
        return found, sure

    def is_whole(self, finished: Finished) -> bool:
        """Whether the bytes of a tensor are those that were written."""
        return self.digest(finished.name, finished.unit) == finished.sha256

    def digest(self, name: str, unit: int) -> str:
        """The hash of a tensor as it is in its file now."""
        digests, numel = Digests(), self.places[name].spec.numel
        for start in range(0, numel, unit):
            digests.add(start, self.read(name, start, min(start + unit, numel)))
        return digests.hexdigest()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One process at a time."""
        with self._holding("finish.lock", wait=True):
            yield

    @contextmanager
    def _holding(self, file: str, *, wait: bool) -> Iterator[bool]:
        """Hold a file of the folder, which the system lets go of when the process dies; False if another has it."""
        with held(os.open(self.path / file, os.O_RDWR | os.O_CREAT, 0o666), wait=wait) as got:
            yield got is not False

    def once(self, names: Sequence[str], make: Callable[[str, Path], None]) -> list[Path]:
        """The files of these names, each made by one of the processes that ask for it; returns when all are there.

        `make(name, path)` writes a file, which gets its name when it is whole. Who finds one in the making goes on with
        the next, and comes back in the end: to wait for it, or to make it if the other process has died.
        """
        paths = [self.path / name for name in names]
        for wait in (False, True):
            for path in paths:
                if path.exists():
                    continue
                with self._holding(f"{path.name}.lock", wait=wait) as mine:
                    if mine and not path.exists():
                        partial = path.with_name(f"{os.getpid()}-{path.name}")
                        make(path.name, partial)
                        os.replace(partial, path)
        return paths

    def save_statistic(self, statistic: Mapping[str, Any]) -> None:
        """Keep what was gathered over the whole model: it need not be gathered again."""
        partial = self.path / f"statistic.{os.getpid()}"
        partial.write_text(json.dumps(statistic), "utf-8")
        os.replace(partial, self.path / "statistic.json")

    def statistic(self) -> dict[str, Any] | None:
        """What `save_statistic` kept."""
        file = self.path / "statistic.json"
        return json.loads(file.read_text("utf-8")) if file.exists() else None

    def publish(self, overwrite: bool) -> None:
        """Give the result its name, in one step, and remove the rest."""
        with disk_errors(self.output, _GO_ON):
            for file in self.model.iterdir():
                descriptor = os.open(file, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
            sync_directory(self.model)
            put_in_place(self.model, self.output.absolute(), overwrite)
            sync_directory(self.output.absolute().parent)
        shutil.rmtree(self.path, ignore_errors=True)


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a tensor."""
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _lines(manifest: Path) -> Iterator[dict[str, Any]]:
    for line in manifest.read_bytes().splitlines():
        try:
            yield json.loads(line)
        except ValueError:  # a kill in the middle of a line
            continue


def _difference(found: str, work: Mapping[str, Any]) -> str:
    try:
        before = json.loads(found)
    except ValueError:
        before = {}
    keys = sorted(key for key in {*before, *work} if before.get(key) != json.loads(json.dumps(work.get(key))))
    return f"{', '.join(keys)} differ. Remedy: give the same words, or remove that folder"
