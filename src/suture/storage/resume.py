"""The state of a long loop: one file, replaced whole, from which only the same work resumes."""

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from suture.errors import CheckpointError, ConfigError
from suture.storage.atomic import disk_errors, new_file, remove_leftovers, set_aside

log = logging.getLogger(__name__)


class Resume:
    """The state file of one loop.

    `work` says what the loop does (plain data): a file that was left by other work is refused. `every` is the number of
    seconds between saves; a kill costs at most that much work. `earlier` is the number of seconds that the loop took
    before this process took it up, 0 for a loop that begins here.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "state.pt"
    >>> Resume(path, {"lr": 0.1}, every=0).save({"step": 3})
    >>> Resume(path, {"lr": 0.1}).load()
    {'step': 3}
    """

    def __init__(self, path: str | os.PathLike[str], work: Mapping[str, Any], *, every: float = 10.0):
        self.path, self.work, self.every = Path(path), dict(work), every
        self.writable = True
        self.earlier: float | None = None
        self._began = self._saved = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """The last state saved; None if there is none.

        A file that is torn is set aside under another name, with a warning, and the loop begins anew. Raises
        `ConfigError` for the state of other work and `CheckpointError` for a file that holds something else.
        """
        remove_leftovers(self.path)
        content = self._read() if self.path.exists() else None
        if content is None:
            self.earlier = self.earlier or 0.0
            return None
        if not isinstance(content, dict) or not all(isinstance(content.get(key), dict) for key in ("work", "state")):
            raise CheckpointError(f"'{self.path}' holds no state to resume from. Remedy: name another file.")
        self._check_work(content["work"])
        if self.earlier is None:
            self.earlier = float(content.get("seconds", 0.0))
        return content["state"]

    def _read(self) -> Any:
        try:
            return torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file fails in many ways
            if not self.writable:
                return None
            with disk_errors(self.path):
                aside = set_aside(self.path)
            reason = type(error).__name__
            log.warning("'%s' cannot be read (%s) and is now '%s'; the loop begins anew.", self.path, reason, aside)
            return None

    def _check_work(self, saved: Mapping[str, Any]) -> None:
        for key in {**self.work, **saved}:
            if self.work.get(key) != saved.get(key):
                raise ConfigError(
                    f"'{self.path}' was left by other work: {key} was {saved.get(key)!r} and is now "
                    f"{self.work.get(key)!r}. Remedy: remove it or name another file."
                )

    def read_only(self) -> "Resume":
        """The same state for another process of the same loop, which takes it up but never saves."""
        reader = Resume(self.path, self.work)
        reader.writable = False
        return reader

    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self._saved >= self.every

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the file by one that holds this state: tensors, numbers, texts, and lists and dicts of them."""
        if not self.writable:
            return
        with (
            new_file(self.path, 0) as descriptor,
            disk_errors(self.path),
            open(descriptor, "wb", closefd=False) as file,
        ):
            seconds = (self.earlier or 0.0) + time.monotonic() - self._began
            torch.save({"work": self.work, "state": dict(state), "seconds": seconds}, file)  # tensor by tensor
        self._saved = time.monotonic()
