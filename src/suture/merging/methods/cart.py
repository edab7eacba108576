"""CART: centred, low-rank task vectors, https://arxiv.org/abs/2412.12153"""

import math
from typing import Annotated

from annotated_types import Ge, Le
from jaxtyping import Float
from torch import Tensor

from suture.merging.registry import matrix_method
from suture.merging.spectra import NEGLIGIBLE, largest_norm, leading, summed


@matrix_method(paper="https://arxiv.org/abs/2412.12153", workspace=8)
def cart(
    deltas: Float[Tensor, "task out inner"],
    *,
    scaling_factor: float = 2.3,
    rank_ratio: Annotated[float, Ge(0), Le(1)] = 0.16,
) -> Float[Tensor, "out inner"]:
    """Add to the mean of the task vectors the first singular directions of each one's difference to it.

    M = Δ̄ + λ Σ top_k(Δ − Δ̄), with λ = `scaling_factor` and k = ⌈`rank_ratio` · min(out, in)⌉. The authors validate λ
    (2.3 for 8 tasks, 2.4 for 20) and the ratio (0.04 to 0.16).

    >>> import torch
    >>> cart(torch.tensor([[[2.0]], [[4.0]]]))  # what differs from the mean cancels
    tensor([[3.]], dtype=torch.float64)
    """
    mean = summed(deltas) / len(deltas)
    count = math.ceil(rank_ratio * min(mean.shape))
    floor = NEGLIGIBLE * largest_norm(deltas)
    merged = mean.clone()
    for delta in deltas:
        left, values, right = leading(delta.double() - mean, count, floor)
        merged.addmm_(left * values, right.mT, alpha=scaling_factor)
    return merged
