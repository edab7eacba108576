"""The lines of a manifest: what is finished of a merge, and hashes of it."""

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TensorRecord:
    """A tensor that is written: its votes and waiting slices (see `suture.merge.Votes`), and a hash of its bytes.

    `sha256` is that of the checksums (CRC-32) of its slices of `unit` entries each.
    """

    name: str
    unit: int
    sha256: str
    votes: int = 0
    waiting: Sequence[int] = ()


class Digests:
    """The checksums of a tensor's slices, which are written in any order."""

    def __init__(self):
        self.parts: dict[int, bytes] = {}

    def add(self, start: int, data: bytes | memoryview) -> None:
        """Take the bytes of the slice that starts at an entry."""
        self.parts[start] = zlib.crc32(data).to_bytes(4, "little")

    def hexdigest(self) -> str:
        """One hash for all."""
        return hashlib.sha256(b"".join(self.parts[start] for start in sorted(self.parts))).hexdigest()


def manifest_lines(manifest: Path) -> Iterator[dict[str, Any]]:
    """The lines that are whole; a kill or a power cut may have torn some."""
    for text in manifest.read_bytes().splitlines():
        with suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict):
                yield line


def record_of(line: Mapping[str, Any]) -> TensorRecord | None:
    """The record in a line; None for a line that is none."""
    match line:
        case {"name": str(), "unit": int(), "sha256": str(), "votes": int(), "waiting": list(), **rest} if not rest:
            return TensorRecord(**line)
    return None
