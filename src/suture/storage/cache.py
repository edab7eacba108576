"""The folder of what can be made again, and the keys of what is in it."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def cache_directory() -> Path:
    """The folder of files that can be made again: $SUTURE_CACHE, or suture in $XDG_CACHE_HOME or ~/.cache."""
    if os.environ.get("SUTURE_CACHE"):
        return Path(os.environ["SUTURE_CACHE"])
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "suture"


def digest(tensors: Mapping[str, "Tensor"], files: Iterable[Path], *facts: object) -> str:
    """sha256 over tensor names, dtypes, shapes and bytes, file names and bytes, and anything JSON can say."""
    sha = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        sha.update(raw_bytes(tensor))
    for path in sorted(files):
        sha.update(f"\0{path.name}\0{path.stat().st_size}\0".encode())
        sha.update(path.read_bytes())
    return sha.hexdigest()


def raw_bytes(tensor: "Tensor") -> memoryview:
    """The bytes of a contiguous tensor on the CPU, without a copy."""
    import torch

    return tensor.flatten().view(torch.uint8).numpy().data
