"""The hidden folder beside a result in which it is made: the shards, and a manifest of what is finished.

    .NAME.merging/
      work.json      what is merged and how: only the same work resumes in the folder
      i-of-n.jsonl   one line for each tensor that a process has finished, with a hash
      count-r-b.npz  what several processes count together over the whole model, block by block
      model/         the result; it becomes NAME in one step when nothing is missing

After a kill, what a line names is there; after a power cut it may not be. So whoever resumes reads it back. A line that
says "synced" is written when all that the lines before it name has reached the disk and was read back; one that denies
it takes them back.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from suture.checkpoints.provenance import PROVENANCE
from suture.errors import OutputError, SutureError, output_refusal
from suture.file_merge.layout import Location, Shard
from suture.file_merge.records import Digests, TensorRecord, manifest_lines, record_of
from suture.storage.atomic import (
    allocate,
    check_replaceable,
    disk_errors,
    held,
    lock,
    put_in_place,
    set_aside,
    sync_directory,
    sync_tree,
    write_at,
    write_bytes,
    write_text,
)

_RESUME = "free some space, or move the folder to another disk; the same command then goes on where it stopped"
_WORK = "work.json"
log = logging.getLogger(__name__)


@dataclass
class WorkingFolder:
    """The folder in which one result is made, by one process or by several at once."""

    output: Path
    shards: Sequence[Shard]
    part: tuple[int, int] = (1, 1)
    published: Callable[[Any], bool] = field(default=lambda work: False)  # whether the result of this work is there
    locations: dict[str, Location] = field(init=False)
    _files: dict[str, int] = field(default_factory=dict)
    _manifest: int = -1
    _ours: bool = False
    _new_parents: list[Path] = field(default_factory=list)

    def __post_init__(self):
        self.locations = {name: location for shard in self.shards for name, location in shard.locations.items()}

    @property
    def path(self) -> Path:
        """The hidden folder."""
        return self.output.absolute().with_name(f".{self.output.absolute().name}.merging")

    @property
    def model(self) -> Path:
        """The folder that becomes the result."""
        return self.path / "model"

    @contextmanager
    def open(self, work: Mapping[str, Any]) -> Iterator[bool]:
        """Begin or resume: the shards at their full size, so that a full disk shows now, and this process's manifest.

        False if there is nothing to do: another process has published the result. If the block raises before a tensor
        is finished, or because the merge is refused, the folder is removed.
        """
        with disk_errors(self.path, _RESUME):
            try:
                yield self._enter(work)
            except BaseException as error:
                self._leave()
                if self._ours and self._useless_after(error):
                    self.discard()
                raise
            finally:
                self._leave()

    def _enter(self, work: Mapping[str, Any]) -> bool:
        self._ours = not self.path.exists()
        self._new_parents = [folder for folder in self.path.parents if not folder.exists()]
        with self.alone(make=True):
            if self.published(work):
                return False
            self._claim(work)
            self._ours = True
            self.model.mkdir(exist_ok=True)
            for shard in self.shards:
                self._files[shard.file] = self._open_shard(shard)
            sync_directory(self.model)
            sync_directory(self.path)
            sync_directory(self.path.parent)
        return True

    def _leave(self) -> None:
        for descriptor in [*self._files.values(), self._manifest]:
            if descriptor >= 0:
                os.close(descriptor)
        self._files = {}
        self._manifest = -1

    def _useless_after(self, error: BaseException) -> bool:
        """Whether nothing in the folder helps the next merge."""
        refused = isinstance(error, SutureError) and not isinstance(error, OutputError)
        counted = any(self.path.glob("count-*.npz")) or (self.path / "statistic.json").exists()
        return refused or not (counted or self.records()[0])

    def _claim(self, work: Mapping[str, Any]) -> None:
        """Write down the work, or see that the folder is of the same, and lock the manifest of this share."""
        text = json.dumps(work, indent=1, sort_keys=True)
        file = self.path / _WORK
        if not file.exists():
            self._clear()
            write_text(file, text)
        elif (found := _read_json(file)) != json.loads(text):
            if found is not None and found != recorded_work(self.output):
                raise OutputError(f"'{self.path}' holds the beginning of another merge: {_difference(found, work)}.")
            if found is None:
                log.warning("'%s' cannot be read; the merge begins anew.", file)
            self._clear()
            write_text(file, text)
        i, n = self.part
        self._manifest = os.open(self.path / f"{i}-of-{n}.jsonl", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        if lock(self._manifest) is False:
            problem = f"is being worked on by another process as {i}/{n}"
            raise output_refusal(self.path, problem, "wait for it, or give this one another shard")
        size = os.fstat(self._manifest).st_size
        if size and os.pread(self._manifest, 1, size - 1) != b"\n":
            self._append_bytes(b"\n")  # a kill in the middle of a line

    def _clear(self) -> None:
        """Forget what other work, or work that is not known, has left; its shards are written over."""
        for entry in self.path.iterdir():
            if entry.suffix in (".jsonl", ".npz") or entry.name == "statistic.json":
                entry.unlink()

    def _open_shard(self, shard: Shard) -> int:
        """A shard at its full size, with its header. A kill may have come before either."""
        descriptor = os.open(self.model / shard.file, os.O_RDWR | os.O_CREAT, 0o666)
        if os.fstat(descriptor).st_size != shard.size:
            os.ftruncate(descriptor, min(shard.size, os.fstat(descriptor).st_size))
            allocate(descriptor, shard.size)
        if os.pread(descriptor, len(shard.header), 0) != shard.header:
            write_at(descriptor, memoryview(shard.header), 0)
        return descriptor

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Put bytes at an entry of a tensor."""
        location = self.locations[name]
        write_at(self._files[location.file], data, location.begin + start * location.spec.dtype.itemsize)

    def read(self, name: str, start: int, stop: int) -> bytes:
        """The bytes between two entries of a tensor."""
        location = self.locations[name]
        size = location.spec.dtype.itemsize
        return os.pread(self._files[location.file], (stop - start) * size, location.begin + start * size)

    def start_writing_out(self, name: str) -> None:
        """Have the disk begin with a tensor that is finished, instead of leaving all to the end."""
        location = self.locations[name]
        if hasattr(os, "posix_fadvise"):
            descriptor = self._files[location.file]
            os.posix_fadvise(descriptor, location.begin, location.spec.nbytes, os.POSIX_FADV_DONTNEED)

    def record(self, record: TensorRecord) -> None:
        """Note that a tensor is written."""
        self._append(asdict(record))

    def sync_files(self) -> None:
        """Make all that is written last through a power cut."""
        for descriptor in self._files.values():
            os.fsync(descriptor)

    def withdraw_unsynced(self) -> None:
        """Take back what this process's manifest says and was never synced; what is intact is then recorded anew.

        Otherwise a line about a tensor of another share, which a power cut has spoilt and that share merged again,
        would count as synced with this process's next ones.
        """
        self._append({"synced": False})

    def record_synced(self) -> None:
        """Note that all that was recorded has reached the disk and was read back."""
        self._append({"synced": True})
        os.fsync(self._manifest)

    def _append(self, line: Mapping[str, Any]) -> None:
        self._append_bytes((json.dumps(line, sort_keys=True) + "\n").encode())

    def _append_bytes(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._manifest, data) :]

    def records(self) -> tuple[dict[str, TensorRecord], set[str]]:
        """All tensors that some process has written, and the names of those that are noted as synced."""
        records: dict[str, TensorRecord] = {}
        synced: set[str] = set()
        for manifest in sorted(self.path.glob("*-of-*.jsonl")):
            own, own_synced = self._records_of(manifest)
            records |= own
            synced = (synced - own.keys()) | own_synced
        return records, synced

    def _records_of(self, manifest: Path) -> tuple[dict[str, TensorRecord], set[str]]:
        records: dict[str, TensorRecord] = {}
        synced: set[str] = set()
        fresh: set[str] = set()
        for line in manifest_lines(manifest):
            if line.get("synced") is True:
                synced |= fresh
                fresh = set()
            elif line.get("synced") is False:
                for name in fresh:
                    del records[name]
                fresh = set()
            elif (record := record_of(line)) and record.name in self.locations:
                records[record.name] = record
                synced.discard(record.name)
                fresh.add(record.name)
        return records, synced

    def is_intact(self, record: TensorRecord) -> bool:
        """Whether the bytes of a tensor, read back, are those that were written."""
        return self.digests(record.name, record.unit).hexdigest() == record.sha256

    def digests(self, name: str, unit: int) -> Digests:
        """The checksums of a tensor as it is in its file now."""
        digests = Digests()
        numel = self.locations[name].spec.numel
        for start in range(0, numel, max(1, unit)):
            digests.add(start, self.read(name, start, min(start + unit, numel)))
        return digests

    def check_headers(self) -> None:
        """Read back the size and header of every shard; raises `OutputError`."""
        for shard in self.shards:
            descriptor = self._files[shard.file]
            size = os.fstat(descriptor).st_size
            if size != shard.size or os.pread(descriptor, len(shard.header), 0) != shard.header:
                raise damaged(self.model / shard.file, "its header")

    @contextmanager
    def alone(self, *, make: bool = False) -> Iterator[bool]:
        """One process at a time; False if the folder is gone, which `make` makes anew."""
        descriptor = self._lock(make)
        try:
            yield descriptor >= 0
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _lock(self, make: bool) -> int:
        """A descriptor of the folder's lock, held; -1 if the folder is gone.

        While one process waits for the lock, the one that has it may remove the folder, and the lock's file with it.
        """
        file = self.path / "finish.lock"
        while True:
            if make:
                self.path.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
                lock(descriptor, wait=True)
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(descriptor), file.stat()):
                        return descriptor
                os.close(descriptor)
            if not (make or self.path.exists()):
                return -1

    @contextmanager
    def _holding(self, file: str, *, wait: bool) -> Iterator[bool]:
        """Hold a file of the folder, which the system lets go of when the process dies; False if another has it."""
        with held(os.open(self.path / file, os.O_RDWR | os.O_CREAT, 0o666), wait=wait) as got:
            yield got is not False

    def once(self, names: Sequence[str], make: Callable[[str], bytes]) -> list[Path]:
        """The files of these names, each made by one of the processes that ask for it; returns when all are there.

        `make(name)` gives a file's content. A process that finds one in the making goes on with the next, and comes
        back in the end: to wait for it, or to make it if the other process has died.
        """
        paths = [self.path / name for name in names]
        for wait in (False, True):
            for path in paths:
                if path.exists():
                    continue
                with self._holding(f"{path.name}.lock", wait=wait) as mine:
                    if mine and not path.exists():
                        write_bytes(path, make(path.name))
        return paths

    def save_statistic(self, statistic: Mapping[str, Any]) -> None:
        """Save what was gathered over the whole model: it need not be gathered again."""
        write_text(self.path / "statistic.json", json.dumps(statistic))

    def statistic(self, read: Callable[[Any], Any]) -> Any:
        """The statistic that `save_statistic` saved, as `read` returns it; None if there is none.

        A file that cannot be read is set aside, with a warning.
        """
        file = self.path / "statistic.json"
        if not file.exists():
            return None
        try:
            return read(_read_json(file))
        except (TypeError, ValueError, RuntimeError):
            self.set_aside(file)
            return None

    def set_aside(self, file: Path) -> None:
        """Put a state file that cannot be read out of the way, and say so."""
        log.warning("'%s' cannot be read and is now '%s'; it is made anew.", file, set_aside(file))

    def new_folder(self, name: str) -> Path:
        """An empty folder in this one; what a kill has left there is removed."""
        folder = self.path / name
        with disk_errors(self.output, _RESUME):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        return folder

    def publish(self, folder: Path, overwrite: bool, inputs: Iterable[Path]) -> None:
        """Give the result, `model` or what was made of it, its name in one step, and remove the rest; for `alone`."""
        with disk_errors(self.output, _RESUME):
            sync_tree(folder)
            check_replaceable(self.output, overwrite, inputs=inputs)
            put_in_place(folder, self.output.absolute())
            sync_directory(self.output.absolute().parent)
            shutil.rmtree(self.model, ignore_errors=True)  # another process takes it for unfinished work
        self._remove()

    def discard(self) -> None:
        """Remove the folder, unless another process works in it."""
        with self.alone() as there:
            if there:
                self._remove()

    def _remove(self) -> None:
        if any(map(self._locked_by_another, self.path.glob("*-of-*.jsonl"))):
            return
        shutil.rmtree(self.path, ignore_errors=True)
        for folder in self._new_parents:
            with suppress(OSError):
                folder.rmdir()

    def tidy(self) -> None:
        """Remove the folder of a result that is published: the last process to leave does so."""
        with self.alone() as there:
            if there and not self.model.exists():
                self._remove()

    def _locked_by_another(self, manifest: Path) -> bool:
        with suppress(OSError), held(os.open(manifest, os.O_RDWR)) as got:
            own = self._manifest >= 0 and os.path.samestat(os.fstat(self._manifest), manifest.stat())
            return got is False and not own
        return False


def recorded_work(folder: Path) -> Any:
    """The record of a result's inputs and options; None for a folder that is no result of a merge."""
    record = _read_json(folder / PROVENANCE)
    return record.get("work") if isinstance(record, dict) else None


def damaged(path: Path, part: str) -> OutputError:
    """The error for bytes that are read back other than they were written."""
    problem = f"was changed after it was written: {part} is not as it was merged"
    return output_refusal(path, problem, "check the disk and who else writes there; the same command mends it")


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a tensor."""
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _read_json(path: Path) -> Any:
    """The content of a file; None where there is none that can be read."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _difference(found: Any, work: Mapping[str, Any]) -> str:
    before = found if isinstance(found, dict) else {}
    keys = sorted(key for key in {*before, *work} if before.get(key) != json.loads(json.dumps(work.get(key))))
    return f"{', '.join(keys)} differ. Remedy: give the same arguments, or remove that folder"
