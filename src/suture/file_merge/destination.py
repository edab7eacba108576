"""An output at an address of fsspec: made in suture's cache, sent file by file, visible when it is whole."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suture.checkpoints.directories import INDEX_SUFFIX
from suture.checkpoints.provenance import PROVENANCE, file_sha256
from suture.errors import OutputError, output_refusal
from suture.file_merge.workspace import recorded_work
from suture.storage.atomic import held, write_text
from suture.storage.cache import cache_directory
from suture.storage.remote import RemotePath

_SENT = "sent.json"


@dataclass(frozen=True)
class Destination:
    """The place of a result. Object stores cannot rename folders: the file by which a model is found is sent last."""

    address: RemotePath

    @classmethod
    def of(cls, address: str) -> "Destination":
        """The destination of an address."""
        return cls(RemotePath(address))

    @property
    def staging(self) -> Path:
        """The folder in which the result is made."""
        digest = hashlib.sha256(self.address.address.encode()).hexdigest()[:16]
        return cache_directory() / "sending" / digest / self.address.name

    def hold(self, work: Any, make: Callable[[], bool], *, overwrite: bool) -> bool:
        """Make the result and send it, unless the very same is there; whether it is there now.

        Raises `OutputError` for something else that is there, unless it is a merge's and may be replaced.
        """
        if work is not None and self.has(work):
            return True
        try:
            self._check(overwrite)
        except OutputError:
            if work is None or not self.has(work):  # sent by another share, in this moment
                raise
        self._forget_unlike(work)
        if not make():
            return False
        with held(os.open(self.staging.parent / "lock", os.O_RDWR | os.O_CREAT, 0o666), wait=True):
            if self.staging.exists():  # or another share has sent it
                self._send()
        return True

    def has(self, work: Any) -> bool:
        """Whether the result of this work is there, whole."""
        return self._work() == work and self._whole()

    def _forget_unlike(self, work: Any) -> None:
        """Remove what a killed sender left of another result."""
        if self.staging.exists() and (work is None or recorded_work(self.staging) != work):
            shutil.rmtree(self.staging)

    def _work(self) -> Any:
        record = self._record()
        return record.get("work") if isinstance(record, dict) else None

    def _record(self) -> Any:
        with suppress(OSError, ValueError, RecursionError):
            return json.loads((self.address / PROVENANCE).read_bytes())
        return None

    def _whole(self) -> bool:
        return any(map(_is_entry, self._names()))

    def _names(self) -> list[str]:
        return [path.name for path in self.address.iterdir()] if self.address.is_dir() else []

    def _check(self, overwrite: bool) -> None:
        names = self._names()
        if not any(map(_is_entry, names)):  # nothing, or what a killed sender left
            if names and self._record() is None and not self._sent():
                raise output_refusal(self.address, "holds other files", "name another folder, or empty this one")
            return
        if not overwrite:
            raise output_refusal(self.address, "exists already", "name another folder, or give overwrite=true")
        if self._record() is None:
            raise output_refusal(self.address, "is no result of a merge, so it stays", "name another folder")

    def _sent(self) -> dict[str, str]:
        with suppress(OSError, ValueError):
            return json.loads((self.staging.parent / _SENT).read_text("utf-8"))
        return {}

    def _send(self) -> None:
        """Send what is missing, and the file by which the model is found in the end; then remove the folder here."""
        files = sorted(
            self.staging.iterdir(), key=lambda file: (_is_entry(file.name), file.name == PROVENANCE, file.name)
        )
        hashes = {file.name: file_sha256(file) for file in files}
        sent = self._sent()
        there = self._names()
        for name in sorted(there, key=_is_entry, reverse=True):  # of an older result: first it stops being a model
            if sent.get(name) != hashes.get(name, ""):
                (self.address / name).remove()
        for file in files:
            if sent.get(file.name) == hashes[file.name] and file.name in there:
                continue
            (self.address / file.name).send(file)
            sent[file.name] = hashes[file.name]
            write_text(self.staging.parent / _SENT, json.dumps(sent))
        shutil.rmtree(self.staging)
        (self.staging.parent / _SENT).unlink()


def _is_entry(name: str) -> bool:
    """Whether a file, alone, is found as a model: an index, or weights that are no part of several."""
    return name.endswith(INDEX_SUFFIX) or (name.endswith(".safetensors") and "-of-" not in name)
