"""The machine of a run: its hardware, the peak of its memory, and the commit of the working directory."""

import contextlib
import ctypes
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h


def circumstances() -> dict[str, Any]:
    """Date (UTC), commit, hardware and the peaks of memory so far, ready for JSON."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"date": now, "commit": commit(), "hardware": hardware(), "peak_memory": peak_memory()}


def hardware() -> dict[str, Any]:
    """The processor, the number of its cores and of torch's threads, and the accelerators."""
    cores, threads = os.cpu_count() or 0, torch.get_num_threads()
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"processor": _processor(), "cores": cores, "threads": threads, "accelerators": devices}


class Meter:
    """The time since it was made, and the largest resident size of the process since then.

    Only one can measure memory at a time: a new one begins the peak anew.
    """

    def __init__(self):
        _highest[0] = max(_highest[0], _resident_peak())
        self._began, self._restarted = time.perf_counter(), _restart_peak()

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self._began

    @property
    def memory(self) -> int | None:
        """The peak in bytes, libraries included; None where the system cannot begin it anew, as only Linux can."""
        return _resident_peak() if self._restarted else None


_highest = [0]  # the peak from before the kernel's was begun anew
_highest_on_device = [0]  # and torch's


def _restart_peak() -> bool:
    """Begin the kernel's peak of the resident size anew; returns whether it did."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident_peak() -> int:
    """The kernel's peak of the resident size in bytes; 0 where it keeps none."""
    with contextlib.suppress(ImportError):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return 0


def peak_memory() -> dict[str, int]:
    """Bytes: the largest resident size of this process since it began, and of torch's tensors on an accelerator.

    A key is missing where the system does not say: `process` on Windows, `accelerator` without CUDA.
    """
    peaks: dict[str, int] = {}
    if process := max(_resident_peak(), _highest[0]):
        peaks["process"] = process
    if torch.cuda.is_available():
        peaks["accelerator"] = max(_highest_on_device[0], _device_peak())
    return peaks


def _device_peak() -> int:
    return max((torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())), default=0)


def memory_of(function: Callable[[], Any], device: torch.device) -> int:
    """Bytes that a call takes on a GPU at its peak, beyond what is allocated before it."""
    _highest_on_device[0] = max(_highest_on_device[0], _device_peak())
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    return torch.cuda.max_memory_allocated(device) - before


def free_memory(device: torch.device) -> int | None:
    """Bytes that tensors can still take on a GPU, what torch holds unused included; None for other devices."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def give_back_freed_memory() -> None:
    """Let tensors of a megabyte and more have memory of their own for the rest of the process, given back when freed.

    glibc raises this limit up to 32 MB as tensors are freed, and what comes from its heap then stays with the process
    wherever something younger lies above it. Other systems' allocators are left as they are.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 20)


def commit(folder: Path | None = None) -> str:
    """The git commit of a folder, by default the working directory, with "+ changes" if tracked files have changed.

    Empty outside a checkout, or without git.
    """
    try:
        head = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"{head} + changes" if changed else head


def _git(folder: Path | None, *words: str) -> str:
    command = ["git", "--no-optional-locks", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
