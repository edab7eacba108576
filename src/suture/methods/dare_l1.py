"""DARE with what stays scaled to the L1 norm from before, as mergekit has it. https://arxiv.org/abs/2311.03099"""

import threading
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from suture.methods.counter_random import Place, somewhere
from suture.methods.dare import Density, drop
from suture.methods.registry import merge_method
from suture.methods.streams import DeltaStream, OneTensor, per_row, weighted

_NOTHING = 1e-7  # norms below it are left alone


def l1_ratios(
    deltas: DeltaStream, *, density: float | Sequence[float] = 0.5, seed: int = 0, **_
) -> Float[Tensor, " task"]:
    """Σ|δ| over Σ|δ that stays|, for each task; 1 where there is nothing to scale."""
    lock, parts = threading.Lock(), []

    def measure(place: Place, rows: Tensor) -> None:
        kept = drop(rows, density, seed, place, rescale=False)
        norms = torch.stack([rows.abs().sum(1, dtype=torch.float64), kept.abs().sum(1, dtype=torch.float64)])
        with lock:
            parts.append(norms)

    deltas.each_place(measure)
    before, after = torch.stack(parts).sort(dim=0).values.sum(0)
    return torch.where((before < _NOTHING) | (after < _NOTHING), 1.0, before / after)


@merge_method(paper="https://arxiv.org/abs/2311.03099", gather=l1_ratios)
def dare_l1(
    base: Float[Tensor, " *shape"],
    deltas: Float[Tensor, " task *shape"],
    statistic: Float[Tensor, " task"] | None = None,
    place: Place | None = None,
    *,
    scaling_factor: float = 0.3,
    density: Density | Sequence[Density] = 0.5,
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> Float[Tensor, " *shape"]:
    """Drop entries as `dare` does and scale what stays, tensor by tensor, to the L1 norm from before.

    Without a `statistic` (the ratio of the norms, for each task) the tensor given is taken as the whole.

    >>> dare_l1(torch.zeros(4), torch.tensor([[1.0, 2.0, 3.0, 4.0]]), scaling_factor=0.9)
    tensor([0., 2., 3., 4.])
    """
    if statistic is None:
        statistic = l1_ratios(OneTensor(deltas, place=place), density=density, seed=seed)
    kept = drop(deltas, density, seed, place or somewhere(deltas), rescale=False)
    kept = kept * per_row(statistic.tolist(), kept, "ratio")
    return base + scaling_factor * weighted(kept, weights).sum(0)
