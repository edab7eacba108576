"""Write results so that a kill at any moment leaves the old file or the whole new one, never a part of it."""

import contextlib
import ctypes
import glob
import json
import mmap
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from suture.checkpoints.checkpoint import DTYPES, TensorSpec
from suture.checkpoints.opening import Source, open_checkpoint
from suture.checkpoints.refusals import output_refusal, short, shown
from suture.checkpoints.safetensors_files import ALIASES_KEY

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_ALIGNMENT = 64
_STALE = 60.0  # seconds


def save_checkpoint(tensors: Source, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
    """Save a mapping name → tensor (or a module, or a checkpoint) as a safetensors file, whole or not at all.

    Tied names are written once and come back as tied when the file is opened. An existing file is replaced.
    Raises `OutputError` if it cannot be written and `CheckpointError` for what is no dense tensor; then
    nothing is left behind.

    >>> import tempfile, torch
    >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
    >>> save_checkpoint({"w": torch.ones(2)}, file)
    >>> open_checkpoint(file)["w"]
    tensor([1., 1.])
    """
    source = open_checkpoint(tensors)
    with allocate_checkpoint(source.specs, path, metadata, aliases=source.aliases) as written:
        for name in source:
            if name not in source.aliases:
                written[name].copy_(source[name])


@contextmanager
def allocate_checkpoint(
    specs: Mapping[str, TensorSpec],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    *,
    aliases: Mapping[str, str] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """A safetensors file of known shapes to be filled in: a dict name → writable tensor, memory-mapped.

    The disk space is taken at once, so a full disk is an `OutputError` before any work. The file gets its
    name when the block ends, and is removed if the block raises; tensors must not be written to after that.
    `aliases` (alias → name) are tied names: in the dict they are the same tensor.
    """
    path, aliases = Path(path), dict(aliases or {})
    stored = {name: spec for name, spec in specs.items() if name not in aliases}
    header, offsets = safetensors_header(stored, path, {"format": "pt", **(metadata or {})}, aliases)
    size = len(header) + sum(spec.nbytes for spec in stored.values())
    with new_file(path, size) as descriptor:
        with disk_errors(path):
            os.pwrite(descriptor, header, 0)
            mapping = mmap.mmap(descriptor, size)
        tensors = {name: _view(mapping, offsets[name], spec) for name, spec in stored.items()}
        yield tensors | {alias: tensors[name] for alias, name in aliases.items()}
        with disk_errors(path):
            mapping.flush()


def safetensors_header(
    specs: Mapping[str, TensorSpec], path: Path, metadata: Mapping[str, str], aliases: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The header and the first byte of every tensor; wide dtypes come first, so that all are aligned."""
    if aliases:
        metadata = {**metadata, ALIASES_KEY: json.dumps(aliases, sort_keys=True)}
    header: dict[str, object] = {"__metadata__": metadata}
    begin, begins = 0, {}
    for name, spec in sorted(specs.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        if spec.dtype not in _CODES:
            problem = f"cannot hold {shown(name)!r}: safetensors has no dtype {short(spec.dtype)}"
            raise output_refusal(path, problem, f"convert it to one of {', '.join(map(short, _CODES))}")
        end = begin + spec.nbytes
        header[name] = {"dtype": _CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end]}
        begins[name], begin = begin, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, {name: 8 + len(text) + at for name, at in begins.items()}


def _view(mapping: mmap.mmap, begin: int, spec: TensorSpec) -> Tensor:
    if spec.numel == 0:
        return torch.empty(spec.shape, dtype=spec.dtype)
    return torch.frombuffer(mapping, dtype=spec.dtype, count=spec.numel, offset=begin).view(spec.shape)


@contextmanager
def new_file(path: Path, size: int) -> Iterator[int]:
    """A descriptor of a hidden file of `size` bytes that takes the name `path` when the block ends well."""
    if path.is_dir():
        raise output_refusal(path, "is a directory, not a file", "name a file to write")
    partial = partial_path(path)
    with _parents(path), _removed_on_error(partial):
        remove_leftovers(path)
        with disk_errors(path):
            descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        with held(descriptor):
            with disk_errors(path):
                allocate(descriptor, size)
            yield descriptor
            with disk_errors(path):
                os.fsync(descriptor)
                os.replace(partial, path)
                sync_directory(path.parent)


@contextmanager
def new_directory(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """An empty hidden directory beside `path` that takes its name when the block ends; removed if it raises.

    An existing directory with something in it is an `OutputError`, unless `overwrite` is given: then it stays
    in place until the new one is complete, and is removed only after that.
    """
    path = Path(path)
    check_replaceable(path, overwrite)
    partial = partial_path(path)
    with _parents(path), _removed_on_error(partial):
        remove_leftovers(path)
        with disk_errors(path):
            partial.mkdir()
            descriptor = os.open(partial, os.O_RDONLY)
        with held(descriptor):
            yield partial
            with disk_errors(path):
                _sync_tree(partial)
                put_in_place(partial, path, overwrite)
                sync_directory(path.parent)


def remove_leftovers(path: Path) -> None:
    """Remove what killed writers of `path` left beside it; whoever still writes holds a lock on their own."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        with contextlib.suppress(OSError), held(os.open(leftover, os.O_RDONLY)) as got:
            if got and time.time() - leftover.stat().st_mtime > _STALE:
                _remove(leftover)


def partial_path(path: Path) -> Path:
    """A hidden name beside `path` for what is not complete yet; a leftover is never read as a result."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")


def sync_directory(path: Path) -> None:
    """Make the names in a directory last through a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(descriptor: int, *, wait: bool = False) -> bool | None:
    """Hold a file until it is closed or the process dies: whether it is held; None where there are no such locks."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


def allocate(descriptor: int, size: int) -> None:
    """Give a file its size, and the disk space for it where the system can."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)


def check_replaceable(path: Path, overwrite: bool) -> None:
    """Refuse to put a directory where there is a file, or, unless `overwrite`, something else."""
    if path.exists() and not path.is_dir():
        raise output_refusal(path, "is a file, not a directory", "name another folder")
    if path.is_dir() and not overwrite and any(path.iterdir()):
        remedy = "name another folder, or allow overwriting"
        raise output_refusal(path, "already exists and is not empty", remedy)


def put_in_place(partial: Path, path: Path, overwrite: bool = False) -> None:
    """Give a whole directory its name in one step; what had it before goes only with `overwrite`, and only then."""
    check_replaceable(path, overwrite)
    if not path.exists():
        os.rename(partial, path)
    elif _exchange(partial, path):
        shutil.rmtree(partial)
    else:
        old = partial_path(path)
        os.rename(path, old)
        try:
            os.rename(partial, path)
        except BaseException:
            os.rename(old, path)
            raise
        shutil.rmtree(old)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories in one step, so that no kill can fall in between; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), swap) == 0


def _sync_tree(directory: Path) -> None:
    for folder, _, files in os.walk(directory):
        for file in files:
            descriptor = os.open(os.path.join(folder, file), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_directory(Path(folder))


@contextmanager
def _parents(path: Path) -> Iterator[None]:
    """Make the folders that lead to `path`; those that were made are removed again if the block raises."""
    missing = [folder for folder in path.absolute().parents if not folder.exists()]
    with disk_errors(path):
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


@contextmanager
def _removed_on_error(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        _remove(path)
        raise


@contextmanager
def held(descriptor: int, *, wait: bool = False) -> Iterator[bool | None]:
    """`lock` an open file or directory for the block, then close it."""
    try:
        yield lock(descriptor, wait=wait)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def disk_errors(path: Path, remedy: str = "free some space, or write to another disk or folder") -> Iterator[None]:
    """What the system says of a disk, as one `OutputError`."""
    try:
        yield
    except OSError as error:
        raise output_refusal(path, f"cannot be written: {error.strerror or error}", remedy) from error
