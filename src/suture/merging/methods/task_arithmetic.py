"""Task Arithmetic, https://arxiv.org/abs/2212.04089."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from suture.merging.registry import merge_method
from suture.merging.streams import weighted


@merge_method(paper="https://arxiv.org/abs/2212.04089", scale="scaling_factor")
def task_arithmetic(
    base: Float[Tensor, " *shape"],
    deltas: Float[Tensor, " task *shape"],
    *,
    scaling_factor: float = 0.3,
    weights: Sequence[float] | None = None,
) -> Float[Tensor, " *shape"]:
    """Add the sum of the task vectors, scaled, to the pretrained weights.

    `weights`: (task,) multiply the task vectors.

    >>> import torch
    >>> task_arithmetic(torch.ones(2), torch.tensor([[1.0, 0.0], [1.0, -2.0]]), scaling_factor=0.5)
    tensor([2., 0.])
    """
    return base + scaling_factor * weighted(deltas, weights).sum(0)
