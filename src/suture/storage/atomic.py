"""Write files and folders so that a kill at any moment leaves the old one or the whole new one, never a part."""

import contextlib
import ctypes
import glob
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from suture.errors import output_refusal

_STALE = 60.0  # seconds


def new_folder(name: str) -> Path:
    """A folder below `outputs` that has this moment in its name."""
    return Path("outputs") / name / datetime.now().strftime("%Y%m%d-%H%M%S")


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


def check_writable(folder: Path) -> None:
    """Refuse, before any work, a folder for results that is a file or lies below one."""
    for path in (folder, *folder.absolute().parents):
        if path.exists() and not path.is_dir():
            raise output_refusal(folder, f"cannot be made: {path} is a file", "name another folder")


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
