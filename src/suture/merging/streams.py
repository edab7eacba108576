"""Streams: a whole tensor or model read in chunks, and sums over it, for methods that gather a statistic."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from suture.errors import ConfigError
from suture.merging.counter_random import SlicePosition, default_position

BLOCK = 1 << 10  # entries: the length of every chunk but the last is a multiple of it
_NEGLIGIBLE = 1e-7  # rows with a smaller L1 norm are not rescaled


#: `function(base, rows)` of one chunk.
Tally = Callable[[Tensor, Tensor], None]


@runtime_checkable
class CompiledTally(Protocol):
    """A `Tally` that can also count the chunks as they are stored."""

    def __call__(self, base: Tensor, rows: Tensor) -> None: ...

    def count(self, loops: Any, slices: Any, deltas: bool) -> bool:
        """Count one chunk with the compiled loops; False where the rows are needed.

        `deltas`: the rows are task vectors, not the models' own weights.
        """
        ...

    def count_on_device(self, rows: Tensor) -> None:
        """Count one chunk that is on a device."""
        ...


@runtime_checkable
class DeltaStream(Protocol):
    """The rows of one tensor or of a whole model, one per task, as flat chunks (task, entries).

    The rows are task vectors, or the models' own weights where the method takes `models`.
    """

    num_entries: int

    def sample(self, num_entries: int) -> Float[Tensor, "task sample"]:
        """About `num_entries` entries of every row, in the widest dtype of the chunks."""
        ...

    def each(self, function: Callable[[Tensor, Tensor], None]) -> None:
        """Call `function(base, rows)` on every chunk, on several threads, in no particular order."""
        ...

    def each_with_position(self, function: Callable[[SlicePosition, Tensor], None]) -> None:
        """Call `function(position, rows)` on every chunk, for methods that draw random numbers.

        Methods of `whole_rows` get rows of shape (task, row, column).
        """
        ...

    def tally(self, function: Tally, totals: Sequence[np.ndarray]) -> None:
        """As `each`, for a function that only adds to `totals`: integer arrays that are zero before the call."""
        ...


class OneTensor:
    """A stream over one tensor already in memory: base (…), rows (task, …)."""

    def __init__(self, rows: Tensor, base: Tensor | None = None, position: SlicePosition | None = None):
        self.position, self.whole = position or default_position(rows), rows
        self.rows = rows.reshape(len(rows), -1)
        self.base = torch.zeros_like(self.rows[0]) if base is None else base.reshape(-1)
        self.num_entries = self.rows.shape[1]

    def sample(self, num_entries: int) -> Tensor:
        return self.rows[:, :: max(1, self.num_entries // num_entries)]

    def each(self, function: Callable[[Tensor, Tensor], None]) -> None:
        function(self.base, self.rows)

    def each_with_position(self, function: Callable[[SlicePosition, Tensor], None]) -> None:
        function(self.position, self.whole)

    def tally(self, function: Tally, totals: Sequence[np.ndarray]) -> None:
        self.each(function)


class Derived:
    """A stream with a function applied to each chunk's rows: (task, entries) → (any, entries)."""

    def __init__(self, stream: DeltaStream, function: Callable[[Tensor], Tensor]):
        self.stream, self.function = stream, function
        self.num_entries = stream.num_entries

    def sample(self, num_entries: int) -> Tensor:
        return self.function(self.stream.sample(num_entries))

    def each(self, function: Callable[[Tensor, Tensor], None]) -> None:
        self.stream.each(lambda base, rows: function(base, self.function(rows)))

    def each_with_position(self, function: Callable[[SlicePosition, Tensor], None]) -> None:
        self.stream.each_with_position(lambda position, rows: function(position, self.function(rows)))

    def tally(self, function: Tally, totals: Sequence[np.ndarray]) -> None:
        self.stream.tally(lambda base, rows: function(base, self.function(rows)), totals)


class FromBase(Derived):
    """A stream of models' weights as task vectors."""

    def __init__(self, stream: DeltaStream):
        super().__init__(stream, lambda rows: rows)

    def each(self, function: Callable[[Tensor, Tensor], None]) -> None:
        self.stream.each(lambda base, rows: function(base, rows - base))


def total(stream: DeltaStream, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Σ of `function(base, rows)` over the chunks, in float64, whatever the order in which they arrive.

    The terms are stored as Python numbers: small tensors would fill the gaps that freed chunk buffers leave, and the
    next buffers, of the same size, would no longer fit there.
    """
    parts: list[Any] = []
    stream.each(lambda base, rows: parts.extend(_sums(function, base, rows)))
    return _in_any_order(parts)


def _sums(function: Callable[[Tensor, Tensor], Tensor], base: Tensor, rows: Tensor) -> list[Any]:
    """Terms of the sum of one chunk.

    The sum over a float64 chunk would round differently for every length of chunk, which `memory=` decides. Its terms
    are those of blocks that every length is a multiple of, added without a rounding error that matters.
    """
    if rows.dtype != torch.float64:
        return [function(base, rows).double().tolist()]
    starts = range(0, max(1, rows.shape[1]), BLOCK)
    blocks = torch.stack([function(base[at : at + BLOCK], rows[:, at : at + BLOCK]).double() for at in starts])
    pairs = [_sum_and_rest(column) for column in blocks.reshape(len(blocks), -1).T.tolist()]
    return [
        torch.tensor(side, dtype=torch.float64).view(blocks.shape[1:]).tolist() for side in zip(*pairs, strict=True)
    ]


def _sum_and_rest(terms: Sequence[float]) -> tuple[float, float]:
    """The sum, correctly rounded, and the part that was rounded away."""
    whole = math.fsum(terms)
    return whole, math.fsum([*terms, -whole]) if math.isfinite(whole) else 0.0


def _in_any_order(parts: Sequence[Any]) -> Tensor:
    terms = torch.tensor(parts, dtype=torch.float64)
    sums = [math.fsum(column) for column in terms.reshape(len(terms), -1).T.tolist()]
    return torch.tensor(sums, dtype=torch.float64).view(terms.shape[1:])


def inner_products(stream: DeltaStream, *, with_base: bool = False) -> Float[Tensor, "row row"]:
    """Inner products of all pairs of rows over the whole stream, in float64; `with_base` makes the base the first."""

    def products(base: Tensor, rows: Tensor) -> Tensor:
        rows = (torch.cat([base[None], rows]) if with_base else rows).double()
        return rows @ rows.T

    return total(stream, products)


def from_origin(models: DeltaStream, origin: str) -> DeltaStream:
    """The models as task vectors if `origin` is "base", unchanged if it is "zero"."""
    return models if origin == "zero" else FromBase(models)


def l1_ratios(stream: DeltaStream, thinned: Callable[[SlicePosition, Tensor], Tensor]) -> Float[Tensor, " task"]:
    """(task,) Σ|δ| over Σ|thinned δ|, in float64; 1 where either is negligible."""
    parts: list[Any] = []
    stream.each_with_position(
        lambda position, rows: parts.extend(
            [list(pair) for pair in zip(_l1(rows), _l1(thinned(position, rows)), strict=True)]
        )
    )
    before, after = _in_any_order(parts)
    return torch.where((before < _NEGLIGIBLE) | (after < _NEGLIGIBLE), 1.0, before / after)


def _l1(rows: Tensor) -> list[Sequence[float]]:
    """Terms of Σ|row| of one chunk, as `_sums` has them."""
    magnitudes = rows.abs().reshape(len(rows), -1)
    if rows.dtype != torch.float64:
        return [magnitudes.sum(1, dtype=torch.float64).tolist()]
    return list(zip(*map(_sum_and_rest, magnitudes.tolist()), strict=True))


def weighted(rows: Float[Tensor, " row *shape"], weights: Sequence[float] | None) -> Float[Tensor, " row *shape"]:
    """Each row times its weight; raises `ConfigError` unless there is one weight per row."""
    return rows if weights is None else rows * per_row(weights, rows, "weights")


def per_row(values: float | Sequence[float], rows: Tensor, knob: str) -> Tensor:
    """A knob's value, or its values for each row, as a tensor that broadcasts over the rows."""
    if isinstance(values, int | float):
        return torch.tensor(values, dtype=rows.dtype)
    column = torch.tensor(list(one_each(values, len(rows), knob)), dtype=rows.dtype).to(rows.device)
    return column.view(-1, *[1] * (rows.ndim - 1))


def one_each(values: float | Sequence[float], count: int, knob: str) -> Sequence[float]:
    """A knob's values for `count` models; raises `ConfigError` unless it has one value for all or one for each."""
    if isinstance(values, int | float):
        return [values] * count
    if len(values) != count:
        raise ConfigError(f"method.{knob} has {len(values)} values; wanted one per model, {count}.")
    return values


def combined(
    weights: Float[Tensor, " task"], models: Float[Tensor, " task *shape"], base: Float[Tensor, " *shape"], origin: str
) -> Float[Tensor, " *shape"]:
    """Σ weight · model, or base + Σ weight · task vector if `origin` is "base"."""
    return combination(weights, models) if origin == "zero" else base + combination(weights, models - base)


def combination(weights: Float[Tensor, " row"], rows: Float[Tensor, " row *shape"]) -> Float[Tensor, " *shape"]:
    """Σ weight · row, one row after another, in the rows' dtype."""
    merged = torch.zeros_like(rows[0])
    for weight, row in zip(weights.to(rows.dtype), rows, strict=True):
        merged += weight * row
    return merged
