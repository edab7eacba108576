"""Provenance of a result: versions, and the sha256 of every input file, remembered between runs."""

import contextlib
import hashlib
import json
import os
import platform
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from suture import __version__
from suture.checkpoints.checkpoint import Checkpoint
from suture.core.names import short
from suture.errors import OutputError, refusal
from suture.storage.atomic import write_text
from suture.storage.cache import cache_directory

PROVENANCE = "suture_merge.json"  # beside the weights of a merge of files
_SETTLED = 2_000_000_000  # ns; a file changed this recently may change again without its time stamp showing it


def provenance_of(checkpoints: Mapping[str, Checkpoint]) -> dict[str, Any]:
    """Versions of what ran, and each model's source with the sha256 of its files, ready for JSON.

    A model without files, such as a module, has the sha256 of its tensors.
    """
    packages = {name: _version(name) for name in ("torch", "safetensors", "transformers")}
    return {
        "versions": {"python": platform.python_version(), "suture": __version__, **packages},
        "inputs": {name: _fingerprint(checkpoint) for name, checkpoint in checkpoints.items()},
    }


def file_sha256(path: str | os.PathLike[str]) -> str:
    """The sha256 of a file in hex, from the cache if path, size and time of change are those of before."""
    path = Path(path).absolute()
    try:
        state = _state(path)
        match _known().get(str(path)):
            case [size, changed, str(digest)] if [size, changed] == state:
                return digest
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        unchanged = _state(path) == state
    except OSError as error:
        raise refusal(path, f"cannot be read: {error.strerror or error}", "check that it still exists") from error
    if not unchanged:
        raise refusal(path, "changed while it was read", "leave it alone while it is in use, and run again")
    if time.time_ns() - state[1] > _SETTLED:
        _remember(str(path), [*state, digest])
    return digest


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 in hex of names, dtypes, shapes and values, whatever the order, layout or kind of file."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(json.dumps([name, short(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _state(path: Path) -> list[int]:
    """Size in bytes and time of the last change in ns."""
    state = path.stat()
    return [state.st_size, state.st_mtime_ns]


def _fingerprint(checkpoint: Checkpoint) -> dict[str, Any]:
    if not checkpoint.files:
        return {"source": checkpoint.label, "sha256": content_hash(checkpoint)}
    return {"source": checkpoint.label, "files": {str(path): file_sha256(path) for path in checkpoint.files}}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cache_file() -> Path:
    return cache_directory() / "sha256.json"


def _known() -> dict[str, Any]:
    try:
        known = json.loads(_cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(path: str, entry: list[Any]) -> None:
    """Add to the cache; a cache that cannot be written costs time, not the run."""
    with contextlib.suppress(OutputError):
        write_text(_cache_file(), json.dumps(_known() | {path: entry}))
