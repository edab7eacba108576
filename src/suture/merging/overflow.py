"""Refusal of merged numbers that the dtype of the result cannot hold."""

import torch
from torch import Tensor

from suture.core.names import short
from suture.errors import IncompatibleModels

SMALLER = "choose smaller coefficients, or a base of a wider dtype"


def refuse_overflow(name: str, merged: Tensor, stored: Tensor, *, start: int = 0, remedy: str = SMALLER) -> None:
    """`IncompatibleModels` if entries of a tensor are not finite; `stored` is `merged` in the dtype of the result.

    `start`: the position of the first entry in the whole tensor.
    """
    if not stored.numel():
        return
    low, high = merged.aminmax()
    if max(-low, high) <= torch.finfo(stored.dtype).max:
        return
    finite = stored.reshape(-1).to(merged.dtype).isfinite()  # a little above the largest is rounded down to it
    if finite.all():
        return
    entry, dtype = int((~finite).nonzero()[0]) + start, short(stored.dtype)
    raise IncompatibleModels(f"'{name}' would not be finite at entry {entry} as {dtype}. Remedy: {remedy}.")
