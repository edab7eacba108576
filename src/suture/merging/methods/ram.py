"""Reinforced Agent Merging: average an entry over the models that changed it. https://arxiv.org/abs/2601.13572"""

from typing import Annotated

import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor

from suture.merging.registry import merge_method
from suture.merging.streams import DeltaStream, OneTensor, total

Epsilon = Annotated[float, Ge(0)]


@merge_method(paper="https://arxiv.org/abs/2601.13572")
def ram(
    base: Float[Tensor, " *shape"], deltas: Float[Tensor, " task *shape"], *, epsilon: Epsilon = 1e-5
) -> Float[Tensor, " *shape"]:
    """Add to each entry the mean change of the models that changed it by more than `epsilon`.

    >>> ram(torch.zeros(3), torch.tensor([[1.0, 2.0, 0.0], [0.0, 4.0, 0.0]]))
    tensor([1., 3., 0.])
    """
    changed, count = _changed(deltas, epsilon)
    return base + (deltas * changed).sum(0) / count.clamp_min(1)


def unique_factors(
    deltas: DeltaStream, *, r: float = 0.1, alpha: float = 0.2, epsilon: float = 1e-5
) -> Float[Tensor, " task"]:
    """(task,) factors of the entries that one task alone changed: 1 + r · min(α, shared entries / own entries)."""

    def counts(_, rows: Tensor) -> Tensor:
        changed, count = _changed(rows, epsilon)
        return torch.stack([(changed & (count > 1)).sum(1), (changed & (count == 1)).sum(1)])

    shared, own = total(deltas, counts)
    return 1 + r * (shared / own.clamp_min(epsilon)).clamp(0, alpha)


@merge_method(paper="https://arxiv.org/abs/2601.13572", gather=unique_factors)
def ramplus_tl(
    base: Float[Tensor, " *shape"],
    deltas: Float[Tensor, " task *shape"],
    statistic: Float[Tensor, " task"] | None = None,
    *,
    r: float = 0.1,
    alpha: Annotated[float, Ge(0)] = 0.2,
    epsilon: Epsilon = 1e-5,
) -> Float[Tensor, " *shape"]:
    """Average as `ram` does, and enlarge the entries that only one model changed.

    A model's own entries are multiplied by 1 + r · min(alpha, shared / own), where shared and own count the entries of
    the tensor that it changed with others and alone. Without a `statistic` (this factor for each task) it is computed
    from the tensors given.

    >>> ramplus_tl(torch.zeros(3), torch.tensor([[1.0, 2.0, 0.0], [0.0, 4.0, 0.0]]), alpha=1.0)
    tensor([1.1000, 3.0000, 0.0000])
    """
    if statistic is None:
        statistic = unique_factors(OneTensor(deltas), r=r, alpha=alpha, epsilon=epsilon)
    changed, count = _changed(deltas, epsilon)
    merged = torch.zeros_like(base)
    for row, mask, factor in zip(deltas, changed, statistic.to(base.dtype), strict=True):
        merged += row * mask * torch.where(count == 1, factor, 1 / count.clamp_min(1))
    return base + merged


def _changed(deltas: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Mask (task, …) of the entries that each model changed, and the number of models (…) that changed each."""
    changed = deltas.abs() > epsilon
    return changed, changed.sum(0)
