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
    """What a task's own entries are multiplied with: 1 + r · min(α, shared entries / own entries)."""

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
    """Average as `ram` does, and enlarge the entries that one model alone changed, as many as it shares with others.

    Such a model's entries are multiplied with 1 + r · min(alpha, shared / own), counted over the tensor. Without a
    `statistic` (that factor for each task) the tensor given is taken as the whole.

    >>> ramplus_tl(torch.zeros(3), torch.tensor([[1.0, 2.0, 0.0], [0.0, 4.0, 0.0]]), alpha=1.0)
    tensor([1.1000, 3.0000, 0.0000])
    """
    if statistic is None:
        statistic = unique_factors(OneTensor(deltas), r=r, alpha=alpha, epsilon=epsilon)
    changed, count = _changed(deltas, epsilon)
    merged = torch.zeros_like(base)
    for row, mine, factor in zip(deltas, changed, statistic.to(base.dtype), strict=True):
        merged += row * mine * torch.where(count == 1, factor, 1 / count.clamp_min(1))
    return base + merged


def _changed(deltas: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Which entries each model changed, and how many models did."""
    changed = deltas.abs() > epsilon
    return changed, changed.sum(0)
