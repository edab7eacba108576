"""Where a long loop left off: one file, replaced whole, that only the same work takes up again."""

import io
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from suture.errors import CheckpointError, ConfigError
from suture.storage.atomic import new_file, remove_leftovers


class Resume:
    """The state file of one loop.

    `work` says what the loop does (plain data): a file that was left by other work is refused. `every` is the number of
    seconds between saves; a kill costs at most that much work.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "state.pt"
    >>> Resume(path, {"lr": 0.1}, every=0).save({"step": 3})
    >>> Resume(path, {"lr": 0.1}).load()
    {'step': 3}
    """

    def __init__(self, path: str | os.PathLike[str], work: Mapping[str, Any], *, every: float = 10.0):
        self.path, self.work, self.every = Path(path), dict(work), every
        self.writable = True
        self._saved = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """The last state saved; None if there is none. Raises `ConfigError` if it belongs to other work."""
        remove_leftovers(self.path)
        if not self.path.exists():
            return None
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True)
            found, state = content["work"], content["state"]
        except Exception as error:  # a damaged file fails in any way it likes
            raise CheckpointError(
                f"'{self.path}' holds no state to resume from ({type(error).__name__}). Remedy: remove it."
            ) from None
        for key in self.work | found:
            if self.work.get(key) != found.get(key):
                raise ConfigError(
                    f"'{self.path}' was left by other work: {key} was {found.get(key)!r} and is now "
                    f"{self.work.get(key)!r}. Remedy: remove it or name another file."
                )
        return state

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
        buffer = io.BytesIO()
        torch.save({"work": self.work, "state": dict(state)}, buffer)
        with new_file(self.path, buffer.getbuffer().nbytes) as descriptor, os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(buffer.getbuffer())
        self._saved = time.monotonic()
