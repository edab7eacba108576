"""Refusal of merged values that the dtype of the result cannot represent."""

import torch
from torch import Tensor

from suture.core.names import short
from suture.errors import IncompatibleModels

SMALLER = "choose smaller coefficients, or a base of a wider dtype"


def refuse_overflow(name: str, merged: Tensor, stored: Tensor, *, start: int = 0, remedy: str = SMALLER) -> None:
    """Raise `IncompatibleModels` if `stored`, which is `merged` in the dtype of the result, has non-finite entries.

    `start`: the flat index of the first entry in the whole tensor.
    """
    if not stored.numel():
        return
    low, high = merged.aminmax()
    if max(-low, high) <= torch.finfo(stored.dtype).max:
        return
    finite = stored.reshape(-1).to(merged.dtype).isfinite()  # values slightly above the maximum round down to it
    if finite.all():
        return
    entry, dtype = int((~finite).nonzero()[0]) + start, short(stored.dtype)
    raise IncompatibleModels(f"'{name}' would not be finite at entry {entry} as {dtype}. Remedy: {remedy}.")
