"""Localize-and-Stitch without data: the largest changes of each task, averaged where they overlap.

https://arxiv.org/abs/2408.13656, Algorithm 1, its dataless localisation.
"""

from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import torch
from annotated_types import Gt, Le
from jaxtyping import Float
from torch import Tensor

from suture.merging.order_statistic import kth_magnitudes, share_of
from suture.merging.registry import merge_method
from suture.merging.streams import DeltaStream, OneTensor, one_each

Density = Annotated[float, Gt(0), Le(1)]
DENSITY = 0.05  #: of the authors' dataless runs on language models


class Regions(NamedTuple):
    """`thresholds`: (task,) the smallest magnitude of each task's region."""

    thresholds: Float[Tensor, " task"]


def regions(deltas: DeltaStream, *, density: float | Sequence[float] = DENSITY, **_) -> Regions:
    """The magnitudes that the `density` largest entries of each task vector reach, at least one entry each."""
    count = deltas.num_entries
    shares = one_each(density, len(deltas.sample(1)), "density")
    return Regions(kth_magnitudes(deltas, [count - max(1, share_of(count, share)) + 1 for share in shares]))


@merge_method(paper="https://arxiv.org/abs/2408.13656", gather=regions, searches=1)
def localize_and_stitch(
    base: Float[Tensor, " *shape"],
    deltas: Float[Tensor, " task *shape"],
    statistic: Regions | None = None,
    *,
    density: Density | Sequence[Density] = DENSITY,
    scope: Literal["model", "tensor"] = "model",
) -> Float[Tensor, " *shape"]:
    """Keep the largest entries of each task vector, and average where the tasks' entries overlap.

    `density` is the share of a task's entries, one number or one per task: of the whole model with `scope=model`, of
    each tensor with `scope=tensor`. There is no scaling factor. Entries equal to the smallest that is kept are kept
    too, and entries that a task did not change never count; the authors' code leaves out the smallest. Without a
    `statistic` (the smallest magnitude of each task) it is computed from the tensors given.

    >>> deltas = torch.tensor([[4.0, 3.0, 1.0, 0.0], [1.0, 5.0, 0.0, -6.0]])
    >>> localize_and_stitch(torch.zeros(4), deltas, density=0.5)
    tensor([ 4.,  4.,  0., -6.])
    """
    if statistic is None:
        statistic = regions(OneTensor(deltas), density=density)
    merged, count = torch.zeros_like(base), torch.zeros_like(base)
    for row, threshold in zip(deltas, statistic.thresholds.tolist(), strict=True):
        inside = (row.abs() >= threshold) & (row != 0)
        merged += row * inside
        count += inside
    return base + merged / count.clamp_min_(1)
