"""Atomic, durable writing: after a kill or a power cut there is the old file or folder or the whole new one."""

import contextlib
import ctypes
import glob
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import chain, count
from pathlib import Path

from suture.errors import output_refusal

# What suture leaves in every folder that it writes: the file, and keys that its JSON object always has.
_MARKS = {"suture_merge.json": ("versions", "inputs"), "report.json": ("title", "rows", "tasks")}


def new_folder(name: str) -> Path:
    """A folder below `outputs` that has this moment in its name, and does not exist."""
    first = Path("outputs") / name / datetime.now().strftime("%Y%m%d-%H%M%S")
    later = (first.with_name(f"{first.name}-{number}") for number in count(2))
    return next(folder for folder in chain([first], later) if not folder.exists())


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole and durably, replacing the one of that name; raises `OutputError`."""
    with new_file(path, len(content)) as descriptor, disk_errors(path):
        write_at(descriptor, memoryview(content), 0)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` for text in UTF-8."""
    write_bytes(path, text.encode())


def write_at(descriptor: int, content: memoryview, offset: int) -> None:
    """Write all bytes at an offset of a file; one call to the system may write fewer."""
    while len(content):
        written = os.pwrite(descriptor, content, offset)
        content = content[written:]
        offset += written


@contextmanager
def new_file(path: Path, size: int) -> Iterator[int]:
    """A descriptor of a hidden file of `size` bytes that takes the name `path` when the block ends well."""
    if path.is_dir():
        raise output_refusal(path, "is a directory, not a file", "name a file to write")
    with _parents(path):
        with disk_errors(path):
            remove_leftovers(path)
            partial, descriptor = _new_partial(path, folder=False)
        with _removed_on_error(partial), held(descriptor):
            with disk_errors(path):
                allocate(descriptor, size)
            yield descriptor
            with disk_errors(path):
                os.fsync(descriptor)
                os.replace(partial, path)
                sync_directory(path.parent)


@contextmanager
def new_directory(
    path: str | os.PathLike[str], *, overwrite: bool = False, inputs: Iterable[str | os.PathLike[str]] = ()
) -> Iterator[Path]:
    """An empty hidden directory beside `path` that takes its name when the block ends; removed if it raises.

    What may be replaced is what `check_replaceable` allows. It stays in place until the new directory is complete.
    """
    path = Path(path)
    inputs = list(inputs)
    check_replaceable(path, overwrite, inputs=inputs)
    with _parents(path):
        with disk_errors(path):
            remove_leftovers(path)
            partial, descriptor = _new_partial(path, folder=True)
        with _removed_on_error(partial), held(descriptor):
            yield partial
            check_replaceable(path, overwrite, inputs=inputs)
            with disk_errors(path):
                sync_tree(partial)
                put_in_place(partial, path)
                sync_directory(path.parent)


def remove_leftovers(path: Path) -> None:
    """Remove what killed writers of `path` left beside it; a writer that is alive holds a lock on its own."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        with contextlib.suppress(OSError), held(os.open(leftover, os.O_RDONLY)) as got:
            if got:
                _remove(leftover)


@contextmanager
def scratch_file(path: Path) -> Iterator[int]:
    """A descriptor of an unnamed file in a folder, for measuring the disk; nothing of it stays."""
    partial, descriptor = _new_partial(path / "scratch", folder=False)
    with held(descriptor):
        partial.unlink()
        yield descriptor


def set_aside(path: Path) -> Path:
    """Rename a state file that cannot be read, so that it is no longer in the way; returns the new name."""
    aside = path.with_name(f"{path.name}.unreadable")
    os.replace(path, aside)
    sync_directory(path.parent)
    return aside


def sync_directory(path: Path) -> None:
    """Make the names in a directory last through a power cut."""
    _sync(path)


def sync_tree(directory: Path) -> None:
    """Make a directory and all that is in it last through a power cut."""
    for folder, _, files in os.walk(directory):
        for file in files:
            _sync(os.path.join(folder, file))
        _sync(folder)


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


@contextmanager
def held(descriptor: int, *, wait: bool = False) -> Iterator[bool | None]:
    """`lock` an open file or directory for the block, then close it."""
    try:
        yield lock(descriptor, wait=wait)
    finally:
        os.close(descriptor)


def allocate(descriptor: int, size: int) -> None:
    """Give a file its size, and the disk space for it where the system can."""
    if hasattr(os, "posix_fallocate") and size:
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)


def check_replaceable(path: Path, overwrite: bool, *, inputs: Iterable[str | os.PathLike[str]] = ()) -> None:
    """Refuse a path at which a new directory would replace what must stay; raises `OutputError`.

    Never replaced are a file, a link, the file system's root, and, also through links, an input, a folder that holds
    one, and a folder inside one. With `overwrite` a folder that suture wrote may be, without it only an empty one.
    """
    if not path.name or "\0" in str(path):
        raise output_refusal(path, "names no new folder", "name a folder in it")
    with disk_errors(path, "name a folder that can be read and written"):
        if path.is_symlink():
            raise output_refusal(path, "is a link", f"name the folder itself, '{os.path.realpath(path)}'")
        if path.exists() and not path.is_dir():
            raise output_refusal(path, "is a file, not a directory", "name another folder")
        if not path.exists() or not any(path.iterdir()):
            return
        for source in inputs:
            if relation := _relation(Path(os.path.realpath(path)), Path(os.path.realpath(source))):
                raise output_refusal(path, f"{relation} an input, '{source}'", "name another folder for the output")
        if not overwrite:
            remedy = "name another folder, or allow overwriting with overwrite=true (merge, demo: --overwrite)"
            raise output_refusal(path, "already exists and is not empty", remedy)
        if not is_result(path):
            problem = "holds files that suture did not write; overwriting replaces only its own results"
            raise output_refusal(path, problem, "name another folder, or remove this one yourself")


def check_writable(folder: Path) -> None:
    """Refuse, before any work, a folder for results that is a file or lies below one."""
    for path in (folder, *folder.absolute().parents):
        if path.exists() and not path.is_dir():
            raise output_refusal(folder, f"cannot be made: {path} is a file", "name another folder")


def _relation(output: Path, source: Path) -> str | None:
    """The relation of an output to an input, as a verb; None where they are apart."""
    if output == source:
        return "is"
    if output in source.parents:
        return "holds"
    return "lies in" if source in output.parents else None


def is_result(folder: Path) -> bool:
    """Whether suture wrote a folder: a merge, a run, an evaluation or a report. It is known by its record in JSON."""
    for name, keys in _MARKS.items():
        try:
            record = json.loads((folder / name).read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(record, dict) and all(key in record for key in keys):
            return True
    return False


def put_in_place(partial: Path, path: Path) -> None:
    """Give a complete directory its name in one step; what had the name before is removed after that."""
    if not path.exists():
        os.rename(partial, path)
    elif _exchange(partial, path):
        sync_directory(path.parent)
        shutil.rmtree(partial)
    else:
        old = _partial_path(path)
        os.rename(path, old)
        try:
            os.rename(partial, path)
        except BaseException:
            os.rename(old, path)
            raise
        sync_directory(path.parent)
        shutil.rmtree(old)


@contextmanager
def disk_errors(path: Path, remedy: str = "free some space, or write to another disk or folder") -> Iterator[None]:
    """Report what the system says of a disk as one `OutputError`."""
    try:
        yield
    except OSError as error:
        raise output_refusal(path, f"cannot be written: {error.strerror or error}", remedy) from error


def _partial_path(path: Path) -> Path:
    """A hidden name beside `path` for what is not complete yet; a leftover is never read as a result."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")


def _new_partial(path: Path, *, folder: bool) -> tuple[Path, int]:
    """A new hidden file or folder beside `path`, locked, and its descriptor.

    Another process may take it for a leftover between its making and its locking; then it is made anew.
    """
    while True:
        partial = _partial_path(path)
        if folder:
            partial.mkdir()
            descriptor = os.open(partial, os.O_RDONLY)
        else:
            descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        lock(descriptor)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(partial)):
                return partial, descriptor
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories in one step, so that no kill can fall in between; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), swap) == 0


def _sync(path: str | os.PathLike[str]) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _parents(path: Path) -> Iterator[None]:
    """Make the folders that lead to `path`; those that were made are removed again if the block raises."""
    missing = [folder for folder in path.absolute().parents if not folder.exists()]
    with disk_errors(path):
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            sync_directory(folder.parent)
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


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
