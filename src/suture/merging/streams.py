"""A whole tensor or model that is only ever seen in chunks, and sums over it: what a method gathers from."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from suture.errors import ConfigError
from suture.merging.counter_random import Place, somewhere

_NOTHING = 1e-7  # L1 norms below it are left alone


@runtime_checkable
class DeltaStream(Protocol):
    """The rows of one tensor or of a whole model, one a task, as flat chunks of shape (task, entries).

    The rows are task vectors, or the models' own weights where the method takes `models`.
    """

    num_entries: int

    def sample(self, num_entries: int) -> Float[Tensor, "task sample"]:
        """About so many entries of every row, in the widest dtype of the chunks."""
        ...

    def each(self, function: Callable[[Tensor, Tensor], None]) -> None:
        """Call `function(base, rows)` on every chunk, on several threads, in no particular order."""
        ...

    def each_place(self, function: Callable[[Place, Tensor], None]) -> None:
        """Call `function(place, rows)` on every chunk, for methods that draw random numbers.

        Methods of `whole_rows` get rows of shape (task, row, column).
        """
        ...

    def tally(self, function: Callable[[Tensor, Tensor], None], totals: Sequence[np.ndarray]) -> None:
        """`each` for a function that does nothing but add to `totals`, arrays of integers that are zero before."""
        ...


class OneTensor:
    """A stream over one tensor already in memory: base (…), rows (task, …)."""

    def __init__(self, rows: Tensor, base: Tensor | None = None, place: Place | None = None):
        self.place, self.whole = place or somewhere(rows), rows
        self.rows = rows.reshape(len(rows), -1)
        self.base = torch.zeros_like(self.rows[0]) if base is None else base.reshape(-1)
        self.num_entries = self.rows.shape[1]

    def sample(self, num_entries: int) -> Tensor:
        return self.rows[:, :: max(1, self.num_entries // num_entries)]

    def each(self, function: Callable[[Tensor, Tensor], None]) -> None:
        function(self.base, self.rows)

    def each_place(self, function: Callable[[Place, Tensor], None]) -> None:
        function(self.place, self.whole)

    def tally(self, function: Callable[[Tensor, Tensor], None], totals: Sequence[np.ndarray]) -> None:
        self.each(function)


class Derived:
    """A stream of what a function makes of each chunk's rows: (task, entries) → (any, entries)."""

    def __init__(self, stream: DeltaStream, function: Callable[[Tensor], Tensor]):
        self.stream, self.function, self.num_entries = stream, function, stream.num_entries

    def sample(self, num_entries: int) -> Tensor:
        return self.function(self.stream.sample(num_entries))

    def each(self, function: Callable[[Tensor, Tensor], None]) -> None:
        self.stream.each(lambda base, rows: function(base, self.function(rows)))

    def each_place(self, function: Callable[[Place, Tensor], None]) -> None:
        self.stream.each_place(lambda place, rows: function(place, self.function(rows)))

    def tally(self, function: Callable[[Tensor, Tensor], None], totals: Sequence[np.ndarray]) -> None:
        self.stream.tally(lambda base, rows: function(base, self.function(rows)), totals)


class FromBase(Derived):
    """A stream of models' weights without the base's."""

    def __init__(self, stream: DeltaStream):
        super().__init__(stream, lambda rows: rows)

    def each(self, function: Callable[[Tensor, Tensor], None]) -> None:
        self.stream.each(lambda base, rows: function(base, rows - base))


def total(stream: DeltaStream, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Σ of `function(base, rows)` over the chunks, in float64; the order in which they come does not matter.

    The parts are kept as numbers of Python's: small tensors would lie in the holes that the chunks' buffers leave, so
    that the next buffers, of the same size, would not fit there any more.
    """
    parts: list[Any] = []
    stream.each(lambda base, rows: parts.append(function(base, rows).double().tolist()))
    return _in_any_order(parts)


def _in_any_order(parts: Sequence[Any]) -> Tensor:
    return torch.tensor(parts, dtype=torch.float64).sort(dim=0).values.sum(0)


def inner_products(stream: DeltaStream, *, with_base: bool = False) -> Float[Tensor, "row row"]:
    """⟨row, row⟩ of every two rows over the whole stream, in float64; `with_base` puts the base before the rows."""

    def products(base: Tensor, rows: Tensor) -> Tensor:
        rows = (torch.cat([base[None], rows]) if with_base else rows).double()
        return rows @ rows.T

    return total(stream, products)


def from_origin(models: DeltaStream, origin: str) -> DeltaStream:
    """A stream of models as task vectors, if their origin is the base."""
    return models if origin == "zero" else FromBase(models)


def l1_ratios(stream: DeltaStream, thinned: Callable[[Place, Tensor], Tensor]) -> Float[Tensor, " task"]:
    """Σ|δ| over Σ|δ that stays| for each row, in float64; 1 where there is nothing to scale."""
    parts: list[Any] = []
    norms = lambda rows: rows.abs().reshape(len(rows), -1).sum(1, dtype=torch.float64).tolist()
    stream.each_place(lambda place, rows: parts.append([norms(rows), norms(thinned(place, rows))]))
    before, after = _in_any_order(parts)
    return torch.where((before < _NOTHING) | (after < _NOTHING), 1.0, before / after)


def weighted(rows: Float[Tensor, " row *shape"], weights: Sequence[float] | None) -> Float[Tensor, " row *shape"]:
    """Each row times its weight; `ConfigError` if there is not one for each."""
    return rows if weights is None else rows * per_row(weights, rows, "weights")


def per_row(values: float | Sequence[float], rows: Tensor, knob: str) -> Tensor:
    """A knob's value, or one value for each row, as a tensor that spreads over the rows."""
    if isinstance(values, int | float):
        return torch.tensor(values, dtype=rows.dtype)
    column = torch.tensor(list(one_each(values, len(rows), knob)), dtype=rows.dtype).to(rows.device)
    return column.view(-1, *[1] * (rows.ndim - 1))


def one_each(values: Sequence[float], count: int, knob: str) -> Sequence[float]:
    """The values of a knob; `ConfigError` if there is not one for each of `count` models."""
    if len(values) != count:
        raise ConfigError(f"method.{knob} has {len(values)} values; wanted one per model, {count}.")
    return values


def combined(
    weights: Float[Tensor, " task"], models: Float[Tensor, " task *shape"], base: Float[Tensor, " *shape"], origin: str
) -> Float[Tensor, " *shape"]:
    """Σ weight · model, or base + Σ weight · task vector if their origin is the base."""
    return combination(weights, models) if origin == "zero" else base + combination(weights, models - base)


def combination(weights: Float[Tensor, " row"], rows: Float[Tensor, " row *shape"]) -> Float[Tensor, " *shape"]:
    """Σ weight · row, one row after another, in the rows' dtype."""
    merged = torch.zeros_like(rows[0])
    for weight, row in zip(weights.to(rows.dtype), rows, strict=True):
        merged += weight * row
    return merged
