"""Consensus Task Arithmetic: only the entries that several tasks' TALL masks share. https://arxiv.org/abs/2405.07813"""

from collections.abc import Sequence
from typing import Annotated

from annotated_types import Ge
from jaxtyping import Bool, Float
from torch import Tensor

from suture.merging.registry import merge_method
from suture.merging.streams import per_row

Threshold = Annotated[float, Ge(0)]
MASK_THRESHOLD = 0.4  #: λ of the TALL masks; the authors choose it for each task from .2 to .6 on labelled inputs


@merge_method(paper="https://arxiv.org/abs/2405.07813", aliases=("consensus_ta",), num_models=(2, float("inf")))
def consensus(
    base: Float[Tensor, " *shape"],
    deltas: Float[Tensor, " task *shape"],
    *,
    scaling_factor: float = 0.3,
    mask_threshold: Threshold | Sequence[Threshold] = MASK_THRESHOLD,
    agree: Annotated[int, Ge(1)] = 2,
) -> Float[Tensor, " *shape"]:
    """Task Arithmetic on the entries that at least `agree` tasks need; the others stay at the base.

    A task needs an entry if its TALL mask is on: |τ_t| > λ |Σ_s τ_s − τ_t|, with λ the `mask_threshold`, one number or
    one per task. It is independent of `scaling_factor`.

    >>> import torch
    >>> consensus(torch.zeros(2), torch.tensor([[2.0, 4.0], [2.0, -1.0]]), scaling_factor=0.5)
    tensor([2., 0.])
    """
    total = deltas.sum(0)
    needed = tall_mask(deltas, total, mask_threshold).sum(0)
    return base + scaling_factor * total * (needed >= agree)


def tall_mask(
    deltas: Float[Tensor, " task *shape"], total: Float[Tensor, " *shape"], threshold: float | Sequence[float]
) -> Bool[Tensor, " task *shape"]:
    """The TALL masks: |τ_t| > λ |Σ_s τ_s − τ_t|, strict, so that a task that did not move an entry never needs it."""
    return deltas.abs() > (total - deltas).abs_().mul_(per_row(threshold, deltas, "mask_threshold"))
