"""What a checkpoint stores of low-precision weights, and what a decoder makes of it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from suture.checkpoints.checkpoint import Entry, TensorSpec
from suture.checkpoints.encoding import Encoder, Part
from suture.errors import refusal, shown

#: Decodes some rows of a matrix (rows, columns): (first, last) → float32.
RowPart = Callable[[int, int], Float[Tensor, "rows columns"]]

#: The names of dtypes in configurations.
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
PLAIN = "give the model in float32, bfloat16 or float16"
_AGAIN = "copy or download the model again"


class Decoded(NamedTuple):
    """One decoded tensor: its name, its shape, its entries, the stored names that it takes, and the format in words.

    `dtype` is its own, where it says so; `encode` writes such codes again, where that is known.
    """

    name: str
    shape: tuple[int, ...]
    part: Part
    takes: Sequence[str]
    kind: str
    dtype: torch.dtype | None = None
    encode: Encoder | None = None


class Stored(NamedTuple):
    """The stored tensors of a checkpoint and the quantization_config of its config.json."""

    entries: Mapping[str, Entry]
    settings: Mapping[str, Any]
    where: object

    def spec(self, name: str) -> TensorSpec | None:
        """Shape and dtype of a stored tensor; None where there is none."""
        entry = self.entries.get(name)
        return None if entry is None else entry.spec

    def read(self, name: str) -> Tensor:
        """A stored tensor."""
        return self.entries[name].read()

    def wrong(self, name: str, found: str) -> Exception:
        return refusal(self.where, f"has {found} for '{shown(name)}'", _AGAIN)


def by_rows(columns: int, rows: RowPart) -> Part:
    """Some entries of a flattened matrix, from its rows."""

    def part(start: int, stop: int) -> Tensor:
        if start >= stop:
            return torch.empty(0)
        first, last = start // columns, -(-stop // columns)
        return rows(first, last).reshape(-1)[start - first * columns : stop - first * columns]

    return part
