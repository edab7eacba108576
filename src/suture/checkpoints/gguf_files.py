"""GGUF files of llama.cpp: a header of keys, values and tensors, then the tensors, plain or in blocks of codes.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Blocks are decoded row by row by the `gguf` package, which
llama.cpp publishes; plain tensors need nothing. Names and the order of rows are the file's own.
"""

import math
import struct
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from suture.checkpoints.checkpoint import Codes, Entry, TensorSpec
from suture.checkpoints.decoding import in_steps
from suture.errors import CheckpointError, refusal, shown
from suture.storage.mapped_file import MappedFile

_AGAIN = "copy or download it again"
_PLAIN = {
    0: torch.float32,
    1: torch.float16,
    24: torch.int8,
    25: torch.int16,
    26: torch.int32,
    27: torch.int64,
    28: torch.float64,
    30: torch.bfloat16,
}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
_MOST_AXES = 4  # ggml's own limit
_DEEPEST = 4


class _Stored(NamedTuple):
    """The header's entry of a tensor: its shape, its type's number, and its place behind the header."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


class _Header:
    """The header, read from its start; raises `CheckpointError` where it ends early or makes no sense."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self.file, self.size = path, file, path.stat().st_size

    def wrong(self, what: str) -> CheckpointError:
        return refusal(self.path, f"is a GGUF file and {what}", _AGAIN)

    def bytes(self, count: int) -> bytes:
        found = self.file.read(count) if count <= self.size else b""
        if len(found) != count:
            raise self.wrong("ends within its header")
        return found

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.bytes(struct.calcsize(f"<{kind}")))[0]

    def text(self) -> str:
        try:
            return self.bytes(self.number("Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise self.wrong("has text that is not UTF-8") from None

    def value(self, kind: int, depth: int = 0) -> Any:
        """A value; of a list only that it is there."""
        if kind == _TEXT:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _LIST or depth == _DEEPEST:
            raise self.wrong(f"has a value of the unknown type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            self.bytes(count * struct.calcsize(f"<{_SCALARS[inner]}"))
            return None
        for _ in range(count):  # each takes bytes, so that a wrong count ends with the file
            self.value(inner, depth + 1)
        return None

    def tensor(self) -> _Stored:
        name, axes = self.text(), self.number("I")
        if axes > _MOST_AXES:
            raise self.wrong(f"gives {shown(name)!r} {axes} axes")
        shape = tuple(self.number("Q") for _ in range(axes))
        return _Stored(name, shape[::-1], self.number("I"), self.number("Q"))


def read_gguf(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The entries of a GGUF file, and its values that are text; `CheckpointError` if it is not whole."""
    with path.open("rb") as file:
        header = _Header(path, file)
        header.bytes(4)
        if (version := header.number("I")) not in (2, 3):
            raise header.wrong(f"has version {version}; 2 and 3 are read")
        tensors, values = header.number("Q"), header.number("Q")
        found = [(header.text(), header.value(header.number("I"))) for _ in range(values)]
        stored = [header.tensor() for _ in range(tensors)]
        end = file.tell()
    alignment = dict(found).get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise header.wrong("has no valid alignment")
    start, mapped = -(-end // alignment) * alignment, MappedFile(path)
    entries = {each.name: _entry(header, mapped, each, start) for each in stored}
    if len(entries) != len(stored):
        raise header.wrong("has a name twice")
    return entries, {key: value for key, value in found if isinstance(value, str)}


def _entry(header: _Header, mapped: MappedFile, stored: _Stored, start: int) -> Entry:
    dtype = _PLAIN.get(stored.kind)
    spec = TensorSpec(stored.shape, dtype or torch.bfloat16)
    if not spec.addressable:
        raise header.wrong(f"gives {shown(stored.name)!r} a shape larger than any tensor can have")
    kind, block, size, decode = _blocks(header, stored) if dtype is None else ("", 1, dtype.itemsize, None)
    columns = stored.shape[-1] if stored.shape else 1
    if columns % block:
        raise header.wrong(f"divides rows of {columns} entries of {shown(stored.name)!r} into blocks of {block}")
    width, begin = columns // block * size, start + stored.offset
    if begin + math.prod(stored.shape[:-1]) * width > header.size:
        raise header.wrong(f"ends within {shown(stored.name)!r}")
    if dtype is not None:
        return Entry(spec, lambda: mapped.tensor(begin, spec.numel, spec.dtype).view(spec.shape), file=mapped)
    assert decode is not None
    part = in_steps(partial(_part, mapped, begin, width, columns, decode))
    codes = Codes(f"{kind} blocks of GGUF", {}, lambda name: mapped.tensor(begin, spec.numel, torch.uint8))
    whole = lambda: part(0, spec.numel).view(spec.shape).to(spec.dtype)
    return Entry(spec, whole, part=part, file=mapped, codes=codes)


def _part(
    mapped: MappedFile, begin: int, width: int, columns: int, decode: Callable[[Any], Any], start: int, stop: int
) -> Tensor:
    """Some entries of a flattened tensor, from its rows of `width` bytes."""
    first, last = start // columns, -(-stop // columns)
    rows = mapped.tensor(begin + first * width, (last - first) * width, torch.uint8).view(-1, width)
    values = torch.from_numpy(decode(rows.numpy()))
    return values.reshape(-1)[start - first * columns : stop - first * columns]


def _blocks(header: _Header, stored: _Stored) -> tuple[str, int, int, Callable[[Any], Any]]:
    """Name, entries and bytes of the blocks of a tensor, and what decodes rows of them into float32."""
    if find_spec("gguf") is None:
        problem = f"is a GGUF file with codes in '{shown(stored.name)}', which the gguf package decodes"
        raise refusal(header.path, problem, "pip install 'suture[gguf]'")
    import gguf
    import numpy as np

    try:
        kind = gguf.GGMLQuantizationType(stored.kind)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        decode = lambda rows: gguf.quants.dequantize(rows, kind)
        decode(np.zeros((1, size), np.uint8))  # some types can be written only
    except (ValueError, KeyError, NotImplementedError):
        names = {each.value: each.name for each in gguf.GGMLQuantizationType}
        name = names.get(stored.kind, f"number {stored.kind}")
        problem = f"is a GGUF file with '{shown(stored.name)}' in the type {name}, which gguf does not decode"
        raise refusal(header.path, problem, "give the model that it was converted from") from None
    return kind.name, block, size, decode
