"""Writing checkpoints: the new file appears whole, or the old one stays."""

import json
import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from suture.checkpoints.checkpoint import DTYPES, TensorSpec
from suture.checkpoints.opening import Source, open_checkpoint
from suture.checkpoints.safetensors_files import ALIASES_KEY
from suture.core.names import short
from suture.errors import output_refusal, shown
from suture.storage.atomic import disk_errors, new_file, write_at

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_ALIGNMENT = 64


def save_checkpoint(
    tensors: Source,
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    *,
    pieces: Mapping[str, Mapping[str, TensorSpec]] | None = None,
) -> None:
    """Save a mapping name → tensor (or a module, or a checkpoint) as a safetensors file, whole or not at all.

    Tied names are written once and come back as tied when the file is opened. An existing file is replaced.
    Raises `OutputError` if it cannot be written and `CheckpointError` for what is no dense tensor; then
    nothing is left behind. Tensors in `pieces` are stored in pieces, as in `allocate_checkpoint`.

    >>> import tempfile, torch
    >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
    >>> save_checkpoint({"w": torch.ones(2)}, file)
    >>> open_checkpoint(file)["w"]
    tensor([1., 1.])
    """
    source = open_checkpoint(tensors)
    with allocate_checkpoint(source.specs, path, metadata, aliases=source.aliases, pieces=pieces) as written:
        for name in source:
            if name not in source.aliases:
                written[name].copy_(source[name])


@contextmanager
def allocate_checkpoint(
    specs: Mapping[str, TensorSpec],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    *,
    aliases: Mapping[str, str] | None = None,
    pieces: Mapping[str, Mapping[str, TensorSpec]] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """A safetensors file of known shapes to be filled in: a dict name → writable tensor, memory-mapped.

    The disk space is taken at once, so a full disk is an `OutputError` before any work. The file gets its
    name when the block ends, and is removed if the block raises; tensors must not be written to after that.
    `aliases` (alias → name) are tied names: in the dict they are the same tensor. A tensor in `pieces` is stored as
    these, name → spec, one behind the other, and is one tensor in the dict.
    """
    path, aliases = Path(path), dict(aliases or {})
    own = {name: spec for name, spec in specs.items() if name not in aliases}
    parts = {name: (pieces or {}).get(name, {name: spec}) for name, spec in own.items()}
    stored = {part: spec for each in parts.values() for part, spec in each.items()}
    order = {part: (name, place) for name, each in parts.items() for place, part in enumerate(each)}
    header, begins = safetensors_header(stored, path, {"format": "pt", **(metadata or {})}, aliases, order)
    offsets = {name: begins[next(iter(each))] for name, each in parts.items()}
    size = len(header) + sum(spec.nbytes for spec in stored.values())
    with new_file(path, size) as descriptor:
        with disk_errors(path):
            write_at(descriptor, memoryview(header), 0)
            mapping = mmap.mmap(descriptor, size)
        tensors = {name: _view(mapping, offsets[name], spec) for name, spec in own.items()}
        yield tensors | {alias: tensors[name] for alias, name in aliases.items()}
        with disk_errors(path):
            mapping.flush()


def safetensors_header(
    specs: Mapping[str, TensorSpec],
    path: Path,
    metadata: Mapping[str, str],
    aliases: Mapping[str, str],
    order: Mapping[str, tuple[str, int]] | None = None,
) -> tuple[bytes, dict[str, int]]:
    """The header and the first byte of every tensor; wide dtypes come first, so that all are aligned.

    Those of one width are in the order of their names, or of the keys in `order`.
    """
    order = order or {name: (name, 0) for name in specs}
    if aliases:
        metadata = {**metadata, ALIASES_KEY: json.dumps(aliases, sort_keys=True)}
    header: dict[str, object] = {"__metadata__": metadata}
    begin, begins = 0, {}
    for name, spec in sorted(specs.items(), key=lambda item: (-item[1].dtype.itemsize, order[item[0]])):
        if spec.dtype not in _CODES:
            problem = f"cannot hold {shown(name)!r}: safetensors has no dtype {short(spec.dtype)}"
            raise output_refusal(path, problem, f"convert it to one of {', '.join(map(short, _CODES))}")
        end = begin + spec.nbytes
        header[name] = {"dtype": _CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end]}
        begins[name], begin = begin, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, {name: 8 + len(text) + at for name, at in begins.items()}


def _view(mapping: mmap.mmap, begin: int, spec: TensorSpec) -> Tensor:
    if spec.numel == 0:
        return torch.empty(spec.shape, dtype=spec.dtype)
    return torch.frombuffer(mapping, dtype=spec.dtype, count=spec.numel, offset=begin).view(spec.shape)
