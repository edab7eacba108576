"""How much memory a piece of work takes: the peak of anonymous memory, which is what a machine runs out of."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_PAUSE = 0.005  # seconds between two looks


def anonymous(process: int | str = "self") -> int:
    """Anonymous memory of a process in bytes; 0 for one that has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def children() -> list[str]:
    """The processes that this one has started."""
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


@contextmanager
def watched() -> Iterator[list[int]]:
    """A list of one number, the peak of added anonymous memory of this process and those it starts, in bytes."""
    before, peak, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], anonymous() - before + sum(map(anonymous, children())))
            time.sleep(_PAUSE)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def measure(work: Callable[[], object]) -> dict[str, float]:
    """Seconds, processor seconds of all threads, and the peak of `watched`."""
    with watched() as peak:
        start, used = time.perf_counter(), time.process_time()
        work()
        return {
            "seconds": time.perf_counter() - start,
            "processor": time.process_time() - used,
            "memory": peak[0],
        }
