"""Speeds of this machine's disks, from short measurements."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from suture.storage.atomic import disk_errors, scratch_file, write_at

_PROBE = 1 << 26  # bytes that are read and written to measure a disk


def read_speed(files: Sequence[Path]) -> float:
    """Bytes a second of the largest file, from the disk and not from what the system has in memory."""
    if not files:
        return float("inf")
    path = max(files, key=lambda path: path.stat().st_size)
    size = min(_PROBE, path.stat().st_size)
    with path.open("rb") as file:
        if hasattr(os, "posix_fadvise") and isinstance(path, Path):
            os.posix_fadvise(file.fileno(), 0, size, os.POSIX_FADV_DONTNEED)
        return size / timed(lambda: [file.read(1 << 20) for _ in range(0, size, 1 << 20)])


def write_speed(output: Path) -> float:
    """Bytes a second, synced, on the disk of a path that need not exist; the probe is removed."""
    data = memoryview(os.urandom(1 << 20))
    with probe_file(output) as descriptor:

        def write() -> None:
            for offset in range(0, _PROBE, 1 << 20):
                write_at(descriptor, data, offset)
            os.fsync(descriptor)

        return _PROBE / timed(write)


@contextmanager
def probe_file(output: Path) -> Iterator[int]:
    """A descriptor of a file on the disk of a path, which is removed again."""
    folder = next(folder for folder in output.absolute().parents if folder.exists())
    with disk_errors(output), scratch_file(folder) as descriptor:
        yield descriptor


def timed(function: Callable[[], object]) -> float:
    """The seconds that a call takes."""
    start = time.perf_counter()
    function()
    return max(time.perf_counter() - start, 1e-9)


def duration(seconds: float) -> str:
    """45 s, 12 min, 3.5 h.

    >>> duration(45), duration(720), duration(12600)
    ('45 s', '12 min', '3.5 h')
    """
    if seconds < 120:
        return f"{max(1, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
