"""Progress bars for a person at a terminal or a notebook, and seconds by activity."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

from suture.core.notebooks import in_notebook

#: track("Decoding mnist", total) opens a progress bar; its block gets the function that counts steps.
Track = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]

log = logging.getLogger(__name__)
_PATIENCE = 1.0  # seconds before a progress bar appears
_shown = ContextVar("shown", default=True)


@contextmanager
def silent() -> Iterator[None]:
    """No progress bar inside the block, not even at a terminal."""
    token = _shown.set(False)
    try:
        yield
    finally:
        _shown.reset(token)


@contextmanager
def bar(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar with the time left, shown after one second; yields the function that counts steps.

    It is shown at a terminal and in a notebook only.
    """
    if not (_shown.get() and (sys.stderr.isatty() or in_notebook())):
        yield lambda steps: None
        return
    shown = _Bar(description, total)
    try:
        yield shown.advance
    finally:
        shown.stop()


def untracked(description: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """A `Track` that shows nothing."""
    return nullcontext(lambda steps: None)


class _Bar:
    def __init__(self, description: str, total: int):
        self.description, self.total = description, total
        self.start, self.done = time.monotonic(), 0
        self.progress = None

    def advance(self, steps: int) -> None:
        self.done += steps
        if self.progress is None:
            if time.monotonic() - self.start < _PATIENCE:
                return
            self.progress = _columns()
            self.progress.start()
            self.progress.add_task(self.description, total=self.total)
        self.progress.update(self.progress.task_ids[0], completed=self.done)

    def stop(self) -> None:
        if self.progress is not None:
            self.progress.stop()


def _columns():
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=Console(stderr=True), transient=True)


class Profile:
    """Seconds by activity, in the order in which the activities first started."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._inside = 0

    @contextmanager
    def __call__(self, activity: str) -> Iterator[None]:
        """Add the time spent inside the block to an activity; of those that are in no other, the log has a line."""
        start = time.perf_counter()
        self.seconds.setdefault(activity, 0.0)
        self._inside += 1
        try:
            yield
        finally:
            took = time.perf_counter() - start
            self.seconds[activity] += took
            self._inside -= 1
            if not self._inside:
                log.info("%s: %.1f s", activity, took)
