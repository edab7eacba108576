"""Model Breadcrumbs, https://arxiv.org/abs/2312.06795"""

from typing import Annotated, NamedTuple

import torch
from annotated_types import Ge, Gt, Le, Lt
from jaxtyping import Float
from torch import Tensor

from suture.methods.order_statistic import kth_magnitudes
from suture.methods.registry import merge_method
from suture.methods.streams import DeltaStream, OneTensor


class Band(NamedTuple):
    """(task,) the smallest and the largest magnitude that is kept."""

    low: Float[Tensor, " task"]
    high: Float[Tensor, " task"]


def breadcrumbs_band(deltas: DeltaStream, *, density: float = 0.1, gamma: float = 0.01, **_) -> Band:
    """Which magnitudes stay when the largest ones, a share `gamma`, and enough of the smallest ones are removed.

    With d entries, int(d · density) stay. If gamma leaves fewer, fewer of the largest are removed, as in mergekit.
    """
    kept, outliers = int(density * deltas.num_entries), int(gamma * deltas.num_entries)
    removed = max(0, deltas.num_entries - kept - outliers)
    if kept == 0:
        zeros = kth_magnitudes(deltas, 0)
        return Band(zeros + torch.inf, zeros)
    return Band(kth_magnitudes(deltas, removed + 1), kth_magnitudes(deltas, removed + kept))


@merge_method(paper="https://arxiv.org/abs/2312.06795", gather=breadcrumbs_band)
def breadcrumbs(
    base: Float[Tensor, " *shape"],
    deltas: Float[Tensor, " task *shape"],
    statistic: Band | None = None,
    *,
    scaling_factor: float = 0.3,
    density: Annotated[float, Gt(0), Le(1)] = 0.1,
    gamma: Annotated[float, Ge(0), Lt(1)] = 0.01,
) -> Float[Tensor, " *shape"]:
    """Drop the outliers and the smallest entries of each task vector, tensor by tensor, and add the sum of the rest.

    `density` is the share that stays, `gamma` the share of the largest that goes; entries of equal magnitude stay or go
    together. Without a `statistic` (the magnitudes that stay) the tensor given is taken as the whole.

    >>> deltas = torch.tensor([[9.0, -2.0, 3.0, 0.1]])
    >>> breadcrumbs(torch.zeros(4), deltas, scaling_factor=1.0, density=0.5, gamma=0.25)
    tensor([ 0., -2.,  3.,  0.])
    """
    if statistic is None:
        statistic = breadcrumbs_band(OneTensor(deltas), density=density, gamma=gamma)
    total = torch.zeros_like(base)
    for row, low, high in zip(deltas, *statistic, strict=True):
        magnitudes = row.abs()
        total += row * ((magnitudes >= low) & (magnitudes <= high))
    return base + scaling_factor * total
