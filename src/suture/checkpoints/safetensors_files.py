"""Safetensors files: 8 bytes of header length, a JSON header, then the tensors one after another.

https://huggingface.co/docs/safetensors#format
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from suture.checkpoints.checkpoint import DTYPES, Entry, TensorSpec
from suture.checkpoints.json_files import is_text
from suture.errors import refusal, shown
from suture.storage.mapped_file import MappedFile
from suture.storage.remote import RangedFile, RemotePath

ALIASES_KEY = "aliases"  # the metadata entry in which tied names are kept, as JSON: alias → name
_LONGEST_HEADER = 100_000_000  # the format's own limit
_AGAIN = "copy or download it again"


def read_safetensors(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The entries and the metadata of a safetensors file, from its header; `CheckpointError` if not whole."""
    header, data_start, data_size = _read_header(path)
    metadata = _metadata(path, header.pop("__metadata__", {}))
    where = {name: _location(path, name, value) for name, value in header.items()}
    _check_layout(path, where, data_size)
    entries = _entries(
        path, {name: (spec, data_start + begin) for name, (spec, begin) in where.items()}, data_start + data_size
    )
    for alias, name in _tied_names(path, metadata, entries).items():
        entries[name] = entries[name]._replace(identity=(path, name))
        entries[alias] = entries[name]
    return entries, metadata


def _entries(path: Path, where: Mapping[str, tuple[TensorSpec, int]], size: int) -> dict[str, Entry]:
    """The tensors at these bytes of a file: mapped, or read by ranges where it lies elsewhere."""
    if isinstance(path, RemotePath):
        ranged = RangedFile(path, size)
        return {
            name: Entry(spec, partial(_read, ranged, begin, spec), part=partial(_part, ranged, begin, spec))
            for name, (spec, begin) in where.items()
        }
    file = MappedFile(path)
    return {
        name: Entry(spec, partial(_read, file, begin, spec), file=file, begin=begin)
        for name, (spec, begin) in where.items()
    }


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 10 or not 2 <= length <= min(size - 8, _LONGEST_HEADER):
            problem = f"is truncated or no safetensors file: its header takes {length} of its {size} bytes"
            raise refusal(path, problem, _AGAIN)
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise refusal(path, f"has a corrupt safetensors header ({error})", _AGAIN) from error
    if not isinstance(header, dict):
        raise refusal(path, f"has a {type(header).__name__} for a safetensors header, not an object", _AGAIN)
    return header, 8 + length, size - 8 - length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name is given twice")
    return result


def _metadata(path: Path, found: Any) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise refusal(path, "has metadata that is not a mapping from text to text", _AGAIN)
    return found


def _location(path: Path, name: str, value: Any) -> tuple[TensorSpec, int]:
    """Spec and first byte of a tensor, counted from the end of the header."""
    if not is_text(name):
        raise refusal(path, f"has the name {shown(name)!r}, which is not valid Unicode", "rename the tensor")
    try:
        code, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise refusal(path, f"does not say where {shown(name)!r} is", _AGAIN) from None
    if not isinstance(code, str) or code not in DTYPES:
        problem = f"stores {shown(name)!r} with the unsupported dtype {shown(code)}"
        raise refusal(path, problem, f"convert it to one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in [*shape, begin, end]):
        raise refusal(path, f"gives {shown(name)!r} a shape or offsets that are no whole numbers", _AGAIN)
    spec = TensorSpec(tuple(shape), DTYPES[code])
    if not spec.addressable or max(begin, end) >= 2**63:
        raise refusal(path, f"gives {shown(name)!r} a shape or offsets larger than any tensor can have", _AGAIN)
    if end - begin != spec.nbytes:
        problem = f"keeps {end - begin} bytes for {shown(name)!r}, but {code} {shape} takes {spec.nbytes}"
        raise refusal(path, problem, _AGAIN)
    return spec, begin


def _check_layout(path: Path, where: Mapping[str, tuple[TensorSpec, int]], data_size: int) -> None:
    reached = 0
    for name, (spec, begin) in sorted(where.items(), key=lambda item: (item[1][1], item[1][0].nbytes)):
        if begin != reached:
            problem = "overlaps the tensor before it" if begin < reached else "leaves a gap before it"
            raise refusal(path, f"is corrupt: {shown(name)!r} at byte {begin} {problem}", _AGAIN)
        reached = begin + spec.nbytes
    if reached != data_size:
        state = "truncated" if data_size < reached else "followed by something else"
        raise refusal(path, f"is {state}: its tensors take {reached} bytes, but it holds {data_size}", _AGAIN)


def _read(file: MappedFile | RangedFile, begin: int, spec: TensorSpec) -> Tensor:
    return file.tensor(begin, spec.numel, spec.dtype).view(spec.shape)


def _part(file: RangedFile, begin: int, spec: TensorSpec, start: int, stop: int) -> Tensor:
    return file.tensor(begin + start * spec.dtype.itemsize, stop - start, spec.dtype)


def _tied_names(path: Path, metadata: Mapping[str, str], entries: Mapping[str, Entry]) -> dict[str, str]:
    """Tied names that the metadata speaks of: our own record, or that of `safetensors.torch.save_model`."""
    if ALIASES_KEY not in metadata:  # there each dropped name is a key; a dot tells it from other remarks
        dropped = {a: n for a, n in metadata.items() if a not in entries and n in entries and "." in a}
        return {alias: name for alias, name in dropped.items() if is_text(alias)}
    try:
        aliases = json.loads(metadata[ALIASES_KEY], object_pairs_hook=_unique)
        if all(is_text(alias) and alias not in entries and name in entries for alias, name in aliases.items()):
            return aliases
    except (ValueError, RecursionError, AttributeError, TypeError):
        pass
    raise refusal(path, "has a corrupt record of tied names in its metadata", _AGAIN)
