"""MagMax: of every entry, the largest change. https://arxiv.org/abs/2407.06322"""

import torch
from jaxtyping import Float
from torch import Tensor

from suture.merging.registry import merge_method


@merge_method(paper="https://arxiv.org/abs/2407.06322")
def magmax(
    base: Float[Tensor, " *shape"], deltas: Float[Tensor, " task *shape"], *, scaling_factor: float = 0.5
) -> Float[Tensor, " *shape"]:
    """Add of every entry the change of largest magnitude over the tasks, scaled.

    Of equal magnitudes the later task's counts, as in the published code: only there the order of the tasks matters.

    >>> magmax(torch.zeros(3), torch.tensor([[1.0, -4.0, 2.0], [3.0, 2.0, -2.0]]), scaling_factor=1.0)
    tensor([ 3., -4., -2.])
    """
    largest = deltas[0]
    for row in deltas[1:]:
        largest = torch.where(row.abs() >= largest.abs(), row, largest)
    return base + scaling_factor * largest
