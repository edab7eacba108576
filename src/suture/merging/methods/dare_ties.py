"""DARE before TIES's election and disjoint merge, https://arxiv.org/abs/2311.03099"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from suture.merging.counter_random import SlicePosition, default_position
from suture.merging.methods.dare import Density, drop
from suture.merging.methods.dare_l1 import dare_ratios
from suture.merging.methods.ties_merging import TiesStatistic, ties_merging
from suture.merging.registry import merge_method
from suture.merging.streams import DeltaStream, OneTensor, per_row


def _ratios(deltas: DeltaStream, *, rescale: bool | str = True, **knobs) -> Float[Tensor, " task"]:
    return dare_ratios(deltas, rescale=rescale == "l1", **knobs)


def l1_passes(*, rescale: bool | str, **_) -> int:
    """The number of times that a tensor is read."""
    return 2 if rescale == "l1" else 1


@merge_method(paper="https://arxiv.org/abs/2311.03099", scale="scaling_factor", gather=_ratios, passes=l1_passes)
def dare_ties(
    base: Float[Tensor, " *shape"],
    deltas: Float[Tensor, " task *shape"],
    statistic: Float[Tensor, " task"] | None = None,
    position: SlicePosition | None = None,
    *,
    scaling_factor: float = 0.3,
    density: Density | Sequence[Density] = 0.5,
    merge_func: Literal["sum", "mean", "max"] = "sum",
    rescale: bool | Literal["l1"] = True,
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> Float[Tensor, " *shape"]:
    """Drop entries at random as `dare` does instead of trimming, then elect a sign per column and merge as TIES does.

    `rescale=l1` scales the rest to the tensor's L1 norm from before the drop, as mergekit does, instead of dividing it
    by `density`. Columns whose surviving entries cancel count as positive. `weights`: (task,) multiply the task vectors
    after the drop; `mean` is then Σwδ/Σw.

    >>> base, deltas = torch.zeros(3), torch.tensor([[4.0, 1.0, -3.0], [2.0, -5.0, -1.0]])
    >>> dare_ties(base, deltas, scaling_factor=1.0, density=1.0)
    tensor([ 6., -5., -4.])
    """
    if statistic is None:
        statistic = _ratios(OneTensor(deltas, position=position), rescale=rescale, density=density, seed=seed)
    dropped = drop(deltas, density, seed, position or default_position(deltas), rescale is True)
    if rescale == "l1":
        dropped.mul_(per_row(statistic.tolist(), dropped, "ratio"))
    return elect_and_merge(base, dropped, merge_func=merge_func, scaling_factor=scaling_factor, weights=weights)


def elect_and_merge(base: Tensor, rows: Tensor, **knobs) -> Tensor:
    """TIES without its trim; columns that cancel count as positive."""
    return ties_merging(base, rows, TiesStatistic(torch.zeros(len(rows), dtype=rows.dtype), 1), **knobs)
