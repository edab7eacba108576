"""Model Stock, https://arxiv.org/abs/2403.19522"""

import torch
from jaxtyping import Float
from torch import Tensor

from suture.merging.registry import merge_method
from suture.merging.streams import DeltaStream, OneTensor, inner_products


def stock_ratio(deltas: DeltaStream) -> Float[Tensor, ""]:
    """The interpolation ratio T·cos θ / (1 + (T − 1)·cos θ), with the mean pairwise cosine of the T task vectors."""
    products = inner_products(deltas)
    count, norms = len(products), products.diagonal().sqrt()
    cosines = (products / torch.outer(norms, norms).clamp_min(1e-6)).clamp(-1, 1)
    cosine = cosines[*torch.triu_indices(count, count, offset=1)].mean()
    slope = 1 + (count - 1) * cosine
    return torch.where(slope.abs() < 1e-6, 0.0, count * cosine / slope)  # opposing task vectors: stay at the base


@merge_method(paper="https://arxiv.org/abs/2403.19522", gather=stock_ratio, num_models=(2, float("inf")))
def model_stock(
    base: Float[Tensor, " *shape"],
    deltas: Float[Tensor, " task *shape"],
    statistic: Float[Tensor, ""] | None = None,
) -> Float[Tensor, " *shape"]:
    """Move from the base towards the average of the models, the further the more their task vectors point one way.

    The ratio is one number per tensor. Without a `statistic` (the ratio) it is computed from the tensors given.

    >>> model_stock(torch.zeros(2), torch.tensor([[2.0, 0.0], [2.0, 0.0]]))  # all agree: the average
    tensor([2., 0.])
    >>> model_stock(torch.ones(2), torch.tensor([[2.0, 0.0], [0.0, 2.0]]))  # right angles: the base
    tensor([1., 1.])
    """
    if statistic is None:
        statistic = stock_ratio(OneTensor(deltas))
    return base + statistic.to(base.dtype) * deltas.mean(0)
