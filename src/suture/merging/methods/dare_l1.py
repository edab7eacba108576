"""DARE with what stays scaled to the L1 norm from before, as mergekit has it. https://arxiv.org/abs/2311.03099"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from suture.merging.counter_random import Place, somewhere
from suture.merging.methods.dare import Density, drop
from suture.merging.registry import merge_method
from suture.merging.streams import DeltaStream, OneTensor, l1_ratios, per_row, weighted


def dare_ratios(
    deltas: DeltaStream, *, rescale: bool | str = True, density: float | Sequence[float] = 0.5, seed: int = 0, **_
) -> Float[Tensor, " task"]:
    """Σ|δ| over Σ|δ that stays|, for each task; 1 and no pass if what stays is not scaled by it."""
    if not rescale:
        return torch.ones(len(deltas.sample(1)), dtype=torch.float64)
    return l1_ratios(deltas, lambda place, rows: drop(rows, density, seed, place, rescale=False))


@merge_method(
    paper="https://arxiv.org/abs/2311.03099", gather=dare_ratios, passes=lambda *, rescale, **knobs: 1 + rescale
)
def dare_l1(
    base: Float[Tensor, " *shape"],
    deltas: Float[Tensor, " task *shape"],
    statistic: Float[Tensor, " task"] | None = None,
    place: Place | None = None,
    *,
    scaling_factor: float = 0.3,
    density: Density | Sequence[Density] = 0.5,
    rescale: bool = True,
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> Float[Tensor, " *shape"]:
    """Drop entries as `dare` does and scale what stays, tensor by tensor, to the L1 norm from before.

    `rescale=False` leaves the size of what stays. Without a `statistic` (the ratio of the norms, for each task) the
    tensor given is taken as the whole.

    >>> dare_l1(torch.zeros(4), torch.tensor([[1.0, 2.0, 3.0, 4.0]]), scaling_factor=0.9)
    tensor([0., 2., 3., 4.])
    """
    if statistic is None:
        statistic = dare_ratios(OneTensor(deltas, place=place), rescale=rescale, density=density, seed=seed)
    kept = drop(deltas, density, seed, place or somewhere(deltas), rescale=False)
    kept.mul_(per_row(statistic.tolist(), kept, "ratio"))
    return base + scaling_factor * weighted(kept, weights).sum(0)
