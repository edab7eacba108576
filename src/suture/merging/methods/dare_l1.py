"""DARE that restores the L1 norm of the task vectors, as in mergekit. https://arxiv.org/abs/2311.03099"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from suture.merging.counter_random import SlicePosition, default_position
from suture.merging.methods.dare import Density, drop
from suture.merging.registry import merge_method
from suture.merging.streams import DeltaStream, OneTensor, l1_ratios, per_row, weighted


def dare_ratios(
    deltas: DeltaStream, *, rescale: bool | str = True, density: float | Sequence[float] = 0.5, seed: int = 0, **_
) -> Float[Tensor, " task"]:
    """(task,) Σ|δ| over Σ|δ after the drop|, in float64; without `rescale` 1, and the stream is not read."""
    if not rescale:
        return torch.ones(len(deltas.sample(1)), dtype=torch.float64)
    return l1_ratios(deltas, lambda position, rows: drop(rows, density, seed, position, rescale=False))


@merge_method(
    paper="https://arxiv.org/abs/2311.03099",
    scale="scaling_factor",
    gather=dare_ratios,
    passes=lambda *, rescale, **knobs: 1 + rescale,
)
def dare_l1(
    base: Float[Tensor, " *shape"],
    deltas: Float[Tensor, " task *shape"],
    statistic: Float[Tensor, " task"] | None = None,
    position: SlicePosition | None = None,
    *,
    scaling_factor: float = 0.3,
    density: Density | Sequence[Density] = 0.5,
    rescale: bool = True,
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> Float[Tensor, " *shape"]:
    """Drop entries as `dare` does and scale the rest, tensor by tensor, to the L1 norm from before the drop.

    `rescale=False` does not scale. Without a `statistic` (the ratio of the norms for each task) it is computed from the
    tensors given.

    >>> dare_l1(torch.zeros(4), torch.tensor([[1.0, 2.0, 3.0, 4.0]]), scaling_factor=0.9)
    tensor([0., 2., 3., 4.])
    """
    if statistic is None:
        statistic = dare_ratios(OneTensor(deltas, position=position), rescale=rescale, density=density, seed=seed)
    thinned = drop(deltas, density, seed, position or default_position(deltas), rescale=False)
    thinned.mul_(per_row(statistic.tolist(), thinned, "ratio"))
    return base + scaling_factor * weighted(thinned, weights).sum(0)
