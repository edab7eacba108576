"""An open checkpoint: a read-only mapping name → tensor that reads a tensor when it is asked for."""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from suture.checkpoints.encoding import Encoder
from suture.errors import refusal, shown
from suture.storage.mapped_file import MappedFile

_DTYPE_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}
#: The dtypes that can be read and written, by their names in a safetensors header.
DTYPES: dict[str, torch.dtype] = {
    code: getattr(torch, name) for code, name in _DTYPE_NAMES.items() if hasattr(torch, name)
}
SUPPORTED = frozenset(DTYPES.values())
_MOST_BYTES = 2**63 - 1  # offsets within a tensor are signed numbers of 64 bits
_MOST_DIMENSIONS = 64


class TensorSpec(NamedTuple):
    """Shape and dtype of a tensor that need not have been read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of entries; 1 for a 0-dim tensor."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.dtype.itemsize

    @property
    def addressable(self) -> bool:
        """Whether a tensor of this shape can exist; even an empty one must have strides that fit in 64 bits."""
        if len(self.shape) > _MOST_DIMENSIONS or any(size > _MOST_BYTES for size in self.shape):
            return False
        return math.prod(max(1, size) for size in self.shape) * self.dtype.itemsize <= _MOST_BYTES


class Factors(NamedTuple):
    """A low-rank task vector, up @ down: (rows, rank) and (rank, columns), of a tensor laid out as (rows, columns)."""

    up: Tensor
    down: Tensor

    @classmethod
    def none(cls, rows: int, columns: int) -> "Factors":
        """The task vector of a tensor that was not changed: of rank 0."""
        return cls(torch.zeros(rows, 0), torch.zeros(0, columns))


class Codes(NamedTuple):
    """The stored form of a decoded tensor: its format in words, and the stored tensors that make it up.

    `encode` has the names that it `fills`, and `run(part, stored)` writes the codes of a tensor there, given (start,
    stop) → some of its entries and name → writable tensor; None where a format is decoded only.
    """

    kind: str
    specs: Mapping[str, TensorSpec]
    read: Callable[[str], Tensor]
    encode: Encoder | None = None


class Entry(NamedTuple):
    """One stored tensor. Entries of equal `identity` are one tensor under several names.

    `factors` gives the difference to the base, where it is known to be of low rank. `part(start, stop)` gives some of
    the flattened entries, where that is cheaper than reading all. `file` is where a mapped tensor lies, from byte
    `begin` on where that is known. `codes` is the stored form of a tensor that is decoded when it is read. `pieces`,
    name in the file → spec, are the stored tensors that make up this one, one behind the other.
    """

    spec: TensorSpec
    read: Callable[[], Tensor]
    identity: Hashable = None
    factors: Callable[[], Factors] | None = None
    part: Callable[[int, int], Tensor] | None = None
    file: MappedFile | None = None
    codes: Codes | None = None
    pieces: Mapping[str, TensorSpec] | None = None
    begin: int | None = None


class Parts:
    """A tensor as one row of entries that are made when a slice of it is asked for."""

    def __init__(self, numel: int, part: Callable[[int, int], Tensor]):
        self.numel, self.part = numel, part

    def __len__(self) -> int:
        return self.numel

    def __getitem__(self, piece: slice) -> Tensor:
        start, stop, _ = piece.indices(self.numel)
        return self.part(start, max(start, stop))


class Checkpoint(Mapping[str, Tensor]):
    """A mapping name → tensor: names, shapes and dtypes are known at once, tensors are read when asked for.

    Tensors of files are views of a private memory map: reading takes no anonymous memory, and writing to such
    a tensor changes that copy in memory only, never the file. Tensors of modules and mappings are the
    caller's own, detached: do not write to them. A context manager; tensors that were handed out stay valid
    after it is closed.

    - `label`: what to call it in messages.
    - `specs`: name → `TensorSpec` for every name, tied ones included, from headers alone.
    - `aliases`: tied name → the first, in sorted order, of the names of the same tensor.
    - `files`: the files that the tensors come from; empty for a module or a mapping.
    - `directory`: the model directory with its config and tokenizer, if there is one.
    - `metadata`: the text that was saved beside the tensors (safetensors only).
    - `quantised`: the kind of quantisation that some of the tensors are stored in; None for plain weights.
    - `decoded`: the formats of low-precision codes that are decoded here, in words; empty where there are none.
    - `prefix`: what all stored names began with, such as "module.", and the names here do not.
    """

    def __init__(
        self,
        entries: Mapping[str, Entry],
        label: str,
        *,
        files: tuple[Path, ...] = (),
        directory: Path | None = None,
        metadata: Mapping[str, str] | None = None,
        quantised: str | None = None,
        prefix: str = "",
        decoded: str = "",
    ):
        self.label, self.files, self.directory = label, files, directory
        self.quantised, self.prefix, self.decoded = quantised, prefix, decoded
        self.metadata: Mapping[str, str] = MappingProxyType(dict(metadata or {}))
        self.specs: Mapping[str, TensorSpec] = MappingProxyType({name: e.spec for name, e in entries.items()})
        self.aliases: Mapping[str, str] = MappingProxyType(_aliases(entries))
        self._entries: Mapping[str, Entry] | None = dict(entries)

    def __getitem__(self, name: str) -> Tensor:
        if self._entries is None:
            raise refusal(self.label, f"is closed, so {shown(name)!r} cannot be read", "open it again")
        return self._entries[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __contains__(self, name: object) -> bool:
        return name in self.specs

    def __repr__(self) -> str:
        size = sum(spec.nbytes for name, spec in self.specs.items() if name not in self.aliases)
        return f"Checkpoint({self.label!r}, {len(self)} tensors, {size / 1e6:.1f} MB)"

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def flat(self, name: str) -> Tensor | Parts:
        """All entries of a tensor as one row, to be sliced: a view, or slices that are made when they are asked for.

        The slices of a tensor that is the sum of a base's and an adapter's have the dtype of that sum, not its own.
        """
        entry = (self._entries or {}).get(name)
        if entry is None or entry.part is None:
            return self[name].reshape(-1)
        return Parts(entry.spec.numel, entry.part)

    def let_go(self) -> None:
        """Take what was read of the files out of this process's memory; what was written to such tensors is lost."""
        for file in {id(e.file): e.file for e in (self._entries or {}).values() if e.file is not None}.values():
            file.let_go()

    def factors(self, name: str) -> Factors | None:
        """The difference of a tensor to the base as low-rank factors, if this checkpoint is an adapter; else None."""
        entry = (self._entries or {}).get(name)
        return entry.factors() if entry is not None and entry.factors is not None else None

    @property
    def codes(self) -> Mapping[str, Codes]:
        """The stored form of every tensor that is decoded when it is read."""
        return {name: entry.codes for name, entry in (self._entries or {}).items() if entry.codes is not None}

    @property
    def pieces(self) -> Mapping[str, Mapping[str, TensorSpec]]:
        """The stored tensors, name in the file → spec, of every tensor that is made of several."""
        return {name: entry.pieces for name, entry in (self._entries or {}).items() if entry.pieces is not None}

    def adjacent(self, names: Sequence[str]) -> tuple[MappedFile, int] | None:
        """The file and the first byte of tensors that lie one behind the other in a mapped file; else None."""
        entries = [(self._entries or {})[name] for name in names]
        file, first = entries[0].file, entries[0].begin
        if file is None or first is None:
            return None
        ends = accumulate((entry.spec.nbytes for entry in entries), initial=first)
        row = all(e.file is file and e.begin == end for e, end in zip(entries, ends, strict=False))
        return (file, first) if row else None

    def select(self, names: Mapping[str, str]) -> "Checkpoint":
        """The same checkpoint with some of its tensors only, under other names: new name → name here."""
        if self._entries is None:
            raise refusal(self.label, "is closed", "open it again")
        return self._with({new: self._entries[name] for new, name in names.items()})

    def replaced(self, entries: Mapping[str, Entry]) -> "Checkpoint":
        """The same checkpoint with other tensors under some of its names, and under all names tied to them."""
        merged = dict(self._entries or {})
        for name, entry in entries.items():
            first = self.aliases.get(name, name)
            tied = [alias for alias, canonical in self.aliases.items() if canonical == first]
            for each in (first, *tied):
                merged[each] = entry._replace(identity=("replaced", id(self), first)) if tied else entry
        return self._with(merged)

    def untied(self, names: Mapping[str, str]) -> "Checkpoint":
        """The same checkpoint with these tensors as ones of their own: name → name here, whatever was tied to it."""
        entries = dict(self._entries or {})
        return self._with(entries | {new: entries[name]._replace(identity=None) for new, name in names.items()})

    def tied(self, ties: Mapping[str, str]) -> "Checkpoint":
        """The same checkpoint with some tensors tied to others that have the same values: name → the other."""
        entries = dict(self._entries or {})
        for name, other in ties.items():
            first = self.aliases.get(other, other)
            group = [name, first, *(alias for alias, canonical in self.aliases.items() if canonical == first)]
            entries |= {each: entries[first]._replace(identity=("tied", id(self), first)) for each in group}
        return self._with(entries)

    def extended(self, entries: Mapping[str, Entry]) -> "Checkpoint":
        """The same checkpoint with further tensors."""
        return self._with({**(self._entries or {}), **entries})

    @classmethod
    def joined(cls, parts: Sequence["Checkpoint"], label: str) -> "Checkpoint":
        """One checkpoint with the tensors of several, which have no name in common; the directory is the first's."""
        entries = {name: entry for part in parts for name, entry in (part._entries or {}).items()}
        files = tuple(dict.fromkeys(file for part in parts for file in part.files))
        directory = next((part.directory for part in parts if part.directory), None)
        quantised = next((part.quantised for part in parts if part.quantised), None)
        decoded = next((part.decoded for part in parts if part.decoded), "")
        return cls(entries, label, files=files, directory=directory, quantised=quantised, decoded=decoded)

    def _with(self, entries: Mapping[str, Entry]) -> "Checkpoint":
        """The same checkpoint with other entries."""
        return Checkpoint(
            entries,
            self.label,
            files=self.files,
            directory=self.directory,
            metadata=self.metadata,
            quantised=self.quantised,
            prefix=self.prefix,
            decoded=self.decoded,
        )

    def close(self) -> None:
        """Let go of the files. Names, specs and tensors already handed out stay usable."""
        self._entries = None


def _aliases(entries: Mapping[str, Entry]) -> dict[str, str]:
    first: dict[Hashable, str] = {}
    aliases: dict[str, str] = {}
    for name in sorted(name for name, entry in entries.items() if entry.identity is not None):
        canonical = first.setdefault(entries[name].identity, name)
        if canonical != name:
            aliases[name] = canonical
    return aliases
