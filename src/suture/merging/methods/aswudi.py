"""ASWUDI: WUDI in closed form, with a rank for every matrix, https://github.com/WalkerWorldPeace/MLLMerging"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from suture.merging.methods.swudi import closed_form
from suture.merging.registry import matrix_method


@matrix_method(paper="https://github.com/WalkerWorldPeace/MLLMerging", workspace=8, square=5)
def aswudi(deltas: Float[Tensor, "task out inner"]) -> Float[Tensor, "out inner"]:
    """Minimise WUDI's loss exactly, in as many directions of the tasks' inputs as their spectrum has; nothing to set.

    With the eigenvalues λ of C = Σ ΔᵀΔ/‖Δ‖² these are the first ⌈(Σ√λ)²/Σλ⌉; the other directions keep the sum of the
    task vectors.

    >>> aswudi(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])).float()  # no interference: the sum
    tensor([[1., 1.]])
    """
    return closed_form(deltas, _first)


def _first(values: Tensor) -> Tensor:
    count = math.ceil(float(values.sqrt().sum() ** 2 / values.sum()))
    return torch.ones_like(values[:count])
