"""Gram matrices of layers' inputs, summed over batches, and the weights of their rows."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from suture.adaptation.layer_calls import Call, Layer
from suture.errors import ConfigError

_STRIPS, _WIDE = 8, 512  # a wide Gram is symmetric: computed in strips, only below the diagonal
_ENTRIES = 1 << 25  # entries of unfolded patches at once


def gram(rows: Float[Tensor, "group row in"], weights: Float[Tensor, " row"] | None = None) -> Tensor:
    """Σ over rows of weight · x xᵀ: (group, in, in) in the dtype of the rows."""
    weighed = rows if weights is None else rows * weights[:, None]
    width = rows.shape[-1]
    if width < _WIDE:
        return product(weighed, rows)
    result = rows.new_empty(len(rows), width, width)
    for start in range(0, width, step := -(-width // _STRIPS)):
        stop = min(width, start + step)
        strip = product(weighed[..., start:stop], rows[..., :stop])
        result[:, start:stop, :stop] = strip
        result[:, :stop, start:stop] = strip.mT
    return result


def product(one: Float[Tensor, "group row a"], other: Float[Tensor, "group row b"]) -> Float[Tensor, "group a b"]:
    """Σ over rows of one otherᵀ."""
    return (one[0].T @ other[0])[None] if len(one) == 1 else one.mT @ other


def pieces(call: Call, other: Call | None = None) -> Iterator[tuple[Tensor, Tensor | None, slice]]:
    """The rows of a call, the results of `other` at the same positions, and which of all rows these are.

    The patches of a convolution are many times as large as its input, so they are made for a few images at a time.
    """
    if call.window is None:
        rows = call.rows()
        yield rows, None if other is None else other.results(), slice(0, rows.shape[1])
        return
    count = call.positions[1:].numel()
    kernel = torch.Size(call.window.kernel).numel() * call.input.shape[1]
    step = max(1, _ENTRIES // max(1, count * kernel))
    for start in range(0, len(call.input), step):
        part = slice(start, start + step)
        results = None if other is None else other.part(part).results()
        rows = call.part(part).rows()
        yield rows, results, slice(start * count, start * count + rows.shape[1])


def counted(
    call: Call, weights: Float[Tensor, " row"] | None, other: Call | None = None
) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
    """The rows of a call, the results of `other` at the same rows, and the rows' weights, or None where all are 1.

    Rows of weight 0 are left out: padding may hold anything, also NaN.
    """
    for rows, results, which in pieces(call, other):
        part = None if weights is None else weights[which]
        if part is not None and not (chosen := part > 0).all():
            results = None if results is None else results[:, chosen]
            rows, part = rows[:, chosen], part[chosen]
        yield rows, results, part


class InputGrams:
    """Σ x xᵀ over the inputs of every layer, in float64. Layers with the same inputs share one.

    `sources`: layer → the layer that its Gram matrix is stored under in `grams`; `rows`: the number of inputs of each.
    """

    def __init__(self):
        self.sources: dict[Layer, Layer] = {}
        self.grams: dict[Layer, Tensor] = {}
        self.rows: dict[Layer, int] = {}

    def add(self, calls: Mapping[Layer, Sequence[Call]], positions: "Positions") -> None:
        """Add the inputs of one batch."""
        first: dict[Any, Layer] = {}
        for layer, uses in calls.items():
            key = (*(id(call.input) for call in uses), uses[0].window, layer.groups)
            own = self.sources.setdefault(layer, first.get(key, layer))
            if own != first.setdefault(key, own) and own != layer:
                raise ConfigError(f"'{layer.weight}' shares its inputs with other layers only in some batches.")
            if own == layer:
                for call in uses:
                    self._add_rows(layer, call, positions)

    def _add_rows(self, layer: Layer, call: Call, positions: "Positions") -> None:
        for rows, _, _ in counted(call, positions.of_call(call)):
            more = gram(rows.double())
            self.grams[layer] = more if layer not in self.grams else self.grams[layer].add_(more)
            self.rows[layer] = self.rows.get(layer, 0) + rows.shape[1]


@dataclass(frozen=True)
class Positions:
    """The weights of the positions of a batch: 0 for padding, and `others` for all tokens but the first.

    `mask` (B, P) is 0 at padding; rows may be cut to fewer positions. `length` is that of the block's own tokens.
    """

    batch: int
    mask: Tensor | None = None
    length: int = 1
    others: float = 1.0
    sequence_first: bool = False

    @classmethod
    def of(cls, inputs: Any, batch: int, **facts: Any) -> "Positions":
        """The positions of a batch of inputs, with the padding that its `attention_mask` tells."""
        mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
        return cls(batch, None if mask is None or mask.dim() != 2 else (mask > 0).double(), **facts)

    @property
    def padded(self) -> bool:
        """Whether any position is padding."""
        return self.mask is not None and bool((self.mask == 0).any())

    def of_call(self, call: Call, *, full: bool = True) -> Float[Tensor, " row"] | None:
        """The weights of a call's rows; those that are sent to single experts all count."""
        return None if call.layer.routed else self.weights(call.positions, full=full)

    def weights(self, shape: torch.Size, *, full: bool = True) -> Float[Tensor, " row"] | None:
        """The weights of rows that had this shape before they were flattened, or None where all count alike.

        `full`: all tokens count, whatever `others` is.
        """
        real = None if self.mask is None else _spread(self.mask, tuple(shape), self.sequence_first)
        if full or self.others == 1 or self.length == 1:
            return real
        tokens = torch.ones(self.batch, self.length, dtype=torch.float64)
        tokens[:, 1:] *= self.others
        spread = _spread(tokens, tuple(shape), self.sequence_first, cut=False)
        return spread if real is None else real if spread is None else real * spread


def _spread(weights: Tensor, shape: tuple[int, ...], sequence_first: bool, *, cut: bool = True) -> Tensor | None:
    """Weights (B, P) for rows of a shape: tokens, flat tokens, or tokens of several heads; None for other rows."""
    batch, length = weights.shape
    flat = shape[0] // batch if len(shape) == 1 and shape[0] % batch == 0 else 0
    for count in (length, *((*shape[:3], flat) if cut else ())):
        if 1 < count <= length and (spread := _exactly(weights[:, :count], shape, sequence_first)) is not None:
            return spread
    return None


def _exactly(weights: Tensor, shape: tuple[int, ...], sequence_first: bool) -> Tensor | None:
    batch, length = weights.shape
    if shape == (length, batch) and (sequence_first or length != batch):
        return weights.T.flatten()
    if shape == (batch, length):
        return weights.flatten()
    if shape == (batch * length,):
        return (weights.T if sequence_first else weights).flatten()
    if len(shape) == 3 and shape[:2] == (batch, length):
        return weights[..., None].expand(shape).flatten()
    if len(shape) == 3 and (shape[0], shape[2]) == (batch, length):
        return weights[:, None].expand(shape).flatten()
    return None
