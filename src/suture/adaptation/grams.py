"""Gram matrices of layers' inputs, summed over batches, and the weights of their rows."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from suture.adaptation.layer_calls import Call

_STRIPS, _WIDE = 4, 512  # a wide Gram is symmetric: computed in strips, only below the diagonal
_ENTRIES = 1 << 25  # entries of unfolded patches at once


def gram(rows: Float[Tensor, "group row in"], weights: Float[Tensor, " row"] | None = None) -> Tensor:
    """Σ over rows of weight · x xᵀ: (group, in, in) in the dtype of the rows."""
    weighed = rows if weights is None else rows * weights[:, None]
    width = rows.shape[-1]
    if width < _WIDE:
        return weighed.mT @ rows
    result = rows.new_empty(len(rows), width, width)
    for start in range(0, width, step := -(-width // _STRIPS)):
        stop = min(width, start + step)
        strip = weighed[..., start:stop].mT @ rows[..., :stop]
        result[:, start:stop, :stop] = strip
        result[:, :stop, start:stop] = strip.mT
    return result


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


class Positions(NamedTuple):
    """The weights of a batch's positions: 0 for padding, and `others` for all but the first token.

    `masks`: (B, P) each, for all lengths that the rows of layers may have; `length` is that of the block's own tokens.
    """

    batch: int
    length: int
    masks: tuple[Tensor, ...]
    others: float = 1.0
    sequence_first: bool = False

    @classmethod
    def of(cls, inputs: Any, batch: int, length: int, **facts: Any) -> "Positions":
        """The positions of a batch of inputs, with the padding that its `attention_mask` tells."""
        mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
        masks: list[Tensor] = []
        if mask is not None and mask.dim() == 2:
            masks = [(mask > 0).double()]
            masks += [masks[0][:, :length]] if 1 < length < mask.shape[1] else []
        return cls(batch, length, tuple(masks), **facts)

    def weights(self, shape: torch.Size, *, full: bool = True) -> Float[Tensor, " row"] | None:
        """The weights of rows that had this shape before they were flattened, or None where all count alike.

        `full`: all tokens count, whatever `others` is.
        """
        first = self.others != 1 and not full and self.length > 1
        every = self.masks
        if first and not any(mask.shape[1] == self.length for mask in every):
            every = (*every, torch.ones(self.batch, self.length, dtype=torch.float64))
        for mask in every:
            if first and mask.shape[1] == self.length:
                mask = mask * torch.tensor(
                    [1.0, *[self.others] * (self.length - 1)], dtype=mask.dtype, device=mask.device
                )
            spread = _spread(mask, tuple(shape), self.sequence_first)
            if spread is not None:
                return spread
        return None


def _spread(weights: Tensor, shape: tuple[int, ...], sequence_first: bool) -> Tensor | None:
    """Weights (B, P) for rows of a shape: tokens, flat tokens, or tokens of several heads; None for other rows."""
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
