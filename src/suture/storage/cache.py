"""The folder of what can be made again, and the keys of what is in it."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from suture.errors import OutputError
from suture.storage.atomic import held, write_text

if TYPE_CHECKING:
    from torch import Tensor


def cache_directory() -> Path:
    """The folder of files that can be made again: $SUTURE_CACHE, or suture in $XDG_CACHE_HOME or ~/.cache."""
    if os.environ.get("SUTURE_CACHE"):
        return Path(os.environ["SUTURE_CACHE"])
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "suture"


@contextmanager
def making(path: Path) -> Iterator[None]:
    """Be the only process, of those that share the cache, that makes a file; the others wait, and then find it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:  # a cache that cannot be written is met again by whoever writes
        yield
        return
    with held(descriptor, wait=True):
        yield


def once(path: Path, make: Callable[[], str]) -> str:
    """The text of a file of the cache, which is made by the first process that asks for it."""
    if not path.is_file():
        with making(path):
            if not path.is_file():
                text = make()
                with suppress(OutputError):
                    write_text(path, text)
                return text
    return path.read_text("utf-8")


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
