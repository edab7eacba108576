"""Model Breadcrumbs before TIES's election and disjoint merge, https://arxiv.org/abs/2312.06795"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from suture.merging.methods.breadcrumbs import Band, Gamma, breadcrumbs_band, inside
from suture.merging.methods.dare import Density
from suture.merging.methods.dare_ties import elect_and_merge
from suture.merging.registry import merge_method
from suture.merging.streams import OneTensor


@merge_method(
    paper="https://arxiv.org/abs/2312.06795",
    scale="scaling_factor",
    gather=breadcrumbs_band,
    searches=1,
    passes=lambda **knobs: 3,
)
def breadcrumbs_ties(
    base: Float[Tensor, " *shape"],
    deltas: Float[Tensor, " task *shape"],
    statistic: Band | None = None,
    *,
    scaling_factor: float = 0.3,
    density: Density | Sequence[Density] = 0.1,
    gamma: Gamma | Sequence[Gamma] = 0.01,
    merge_func: Literal["sum", "mean", "max"] = "sum",
    weights: Sequence[float] | None = None,
) -> Float[Tensor, " *shape"]:
    """Drop entries as `breadcrumbs` does, then elect a sign per column and merge as TIES does.

    Columns whose remaining entries cancel count as positive. The knobs are those of `breadcrumbs`; `merge_func` and
    `weights` are those of `dare_ties`.

    >>> deltas = torch.tensor([[9.0, -2.0, 3.0, 0.1], [0.1, 4.0, 2.0, 9.0]])
    >>> breadcrumbs_ties(torch.zeros(4), deltas, scaling_factor=1.0, density=0.5, gamma=0.25)
    tensor([0., 4., 5., 0.])
    """
    if statistic is None:
        statistic = breadcrumbs_band(OneTensor(deltas), density=density, gamma=gamma)
    rows = torch.stack([row * inside(row, low, high) for row, low, high in zip(deltas, *statistic, strict=True)])
    return elect_and_merge(base, rows, merge_func=merge_func, scaling_factor=scaling_factor, weights=weights)
