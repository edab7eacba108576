"""DARE before TIES's election and disjoint merge, https://arxiv.org/abs/2311.03099"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from suture.methods.counter_random import Place
from suture.methods.dare import Density, drop
from suture.methods.registry import merge_method
from suture.methods.ties_merging import TiesStatistic, ties_merging


@merge_method(paper="https://arxiv.org/abs/2311.03099")
def dare_ties(
    base: Float[Tensor, " *shape"],
    deltas: Float[Tensor, " task *shape"],
    place: Place | None = None,
    *,
    scaling_factor: float = 0.3,
    density: Density | Sequence[Density] = 0.5,
    merge_func: Literal["sum", "mean", "max"] = "sum",
    rescale: bool = True,
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> Float[Tensor, " *shape"]:
    """Drop entries at random as `dare` does instead of trimming, then elect a sign per column and merge as TIES does.

    Columns whose surviving entries cancel count as positive. `weights`: (task,) multiply the task vectors after the
    drop; `mean` is then Σwδ/Σw.

    >>> base, deltas = torch.zeros(3), torch.tensor([[4.0, 1.0, -3.0], [2.0, -5.0, -1.0]])
    >>> dare_ties(base, deltas, scaling_factor=1.0, density=1.0)
    tensor([ 6., -5., -4.])
    """
    dropped = drop(deltas, density, seed, place, rescale)
    return elect_and_merge(base, dropped, merge_func=merge_func, scaling_factor=scaling_factor, weights=weights)


def elect_and_merge(base: Tensor, rows: Tensor, **knobs) -> Tensor:
    """TIES without its trim, with `+` for columns that cancel."""
    return ties_merging(base, rows, TiesStatistic(torch.zeros(len(rows), dtype=rows.dtype), 1), **knobs)
