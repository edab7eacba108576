"""TSV-Merge: task singular vectors, https://arxiv.org/abs/2412.00081"""

import torch
from jaxtyping import Float
from torch import Tensor

from suture.merging.registry import matrix_method
from suture.merging.spectra import NEGLIGIBLE, concatenated, largest_norm, leading, polar


@matrix_method(paper="https://arxiv.org/abs/2412.00081", workspace=8)
def tsv_m(deltas: Float[Tensor, "task out inner"]) -> Float[Tensor, "out inner"]:
    """Keep an equal share of each task vector's singular vectors, and make those of all tasks orthogonal.

    Each of T tasks keeps its first ⌊r/T⌋ of r = min(out, in). All left and all right vectors are replaced by the
    nearest orthogonal ones, P(U) and P(V): M = P(U) S P(V)ᵀ. With fewer than T of them M is the mean.

    >>> tsv_m(torch.tensor([[[2.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 3.0]]])).float()
    tensor([[2., 0.],
            [0., 3.]])
    """
    each = min(deltas.shape[1:]) // len(deltas)
    if not each:
        return deltas.mean(0, dtype=torch.float64)
    floor = NEGLIGIBLE * largest_norm(deltas)
    found = (leading(delta.double(), each, floor) for delta in deltas)
    left, values, right = concatenated(found, deltas[0], each * len(deltas))
    return polar(left) * values @ polar(right).mT
