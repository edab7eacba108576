"""Passthrough: one model's weights unchanged, for models assembled from layers of others."""

from jaxtyping import Float
from torch import Tensor

from suture.merging.registry import merge_method


@merge_method(paper="https://arxiv.org/abs/2312.15166", num_models=(1, 1))
def passthrough(
    base: Float[Tensor, " *shape"], models: Float[Tensor, " task *shape"], *, scale: float = 1.0
) -> Float[Tensor, " *shape"]:
    """Take the one model's weights, times `scale`; the base takes no part.

    >>> import torch
    >>> passthrough(torch.zeros(2), torch.tensor([[1.0, 2.0]]), scale=0.5)
    tensor([0.5000, 1.0000])
    """
    return models[0] if scale == 1 else scale * models[0]
