"""Model Breadcrumbs, https://arxiv.org/abs/2312.06795"""

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
from annotated_types import Ge, Lt
from jaxtyping import Float
from torch import Tensor

from suture.merging.methods.dare import Density
from suture.merging.order_statistic import kth_magnitudes
from suture.merging.registry import merge_method
from suture.merging.streams import DeltaStream, OneTensor, one_each

Gamma = Annotated[float, Ge(0), Lt(1)]


class Band(NamedTuple):
    """(task,) the smallest and the largest magnitude that survive."""

    low: Float[Tensor, " task"]
    high: Float[Tensor, " task"]


def breadcrumbs_band(
    deltas: DeltaStream, *, density: float | Sequence[float] = 0.1, gamma: float | Sequence[float] = 0.01, **_
) -> Band:
    """The band of magnitudes that remain without a share `gamma` of the largest and enough of the smallest entries.

    Of d entries int(d · density) remain, computed in floats: 28 of 100 for 0.29. Where `gamma` would leave fewer, fewer
    of the largest are removed. Both as in mergekit.
    """
    count, num_rows = deltas.num_entries, len(deltas.sample(1))
    densities = one_each(density, num_rows, "density")
    gammas = one_each(gamma, num_rows, "gamma")
    remaining = [count if share == 1 else int(share * count) for share in densities]
    removed = [max(0, count - k - int(top * count)) for k, top in zip(remaining, gammas, strict=True)]
    low = kth_magnitudes(deltas, [r + 1 if k else 0 for r, k in zip(removed, remaining, strict=True)])
    high = kth_magnitudes(deltas, [r + k if k else 0 for r, k in zip(removed, remaining, strict=True)])
    return Band(torch.where(torch.tensor(remaining) > 0, low, torch.inf), high)


@merge_method(
    paper="https://arxiv.org/abs/2312.06795",
    scale="scaling_factor",
    gather=breadcrumbs_band,
    searches=1,
    passes=lambda **knobs: 3,
)
def breadcrumbs(
    base: Float[Tensor, " *shape"],
    deltas: Float[Tensor, " task *shape"],
    statistic: Band | None = None,
    *,
    scaling_factor: float = 0.3,
    density: Density | Sequence[Density] = 0.1,
    gamma: Gamma | Sequence[Gamma] = 0.01,
    weights: Sequence[float] | None = None,
) -> Float[Tensor, " *shape"]:
    """Drop the outliers and the smallest entries of each task vector, tensor by tensor, and add the sum of the rest.

    `density` is the share that remains, `gamma` the share of the largest that is dropped; entries of equal magnitude
    share one fate. Either may be one value per model; `weights`: (task,) multiply the task vectors. Without a
    `statistic` (the magnitudes that remain) it is computed from the tensors given.

    >>> deltas = torch.tensor([[9.0, -2.0, 3.0, 0.1]])
    >>> breadcrumbs(torch.zeros(4), deltas, scaling_factor=1.0, density=0.5, gamma=0.25)
    tensor([ 0., -2.,  3.,  0.])
    """
    if statistic is None:
        statistic = breadcrumbs_band(OneTensor(deltas), density=density, gamma=gamma)
    total = torch.zeros_like(base)
    scales = [1.0] * len(deltas) if weights is None else weights
    for row, low, high, weight in zip(deltas, *statistic, scales, strict=True):
        total += weight * row * inside(row, low, high)
    return base + scaling_factor * total


def inside(row: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Mask of the entries whose magnitude lies in the band."""
    magnitudes = row.abs()
    return (magnitudes >= low) & (magnitudes <= high)
