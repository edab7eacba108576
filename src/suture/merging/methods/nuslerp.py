"""NuSLERP: SLERP between two models, or two task vectors, by weights, as in mergekit. Shoemake 1985"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from suture.merging.registry import merge_method
from suture.merging.streams import DeltaStream, OneTensor, combined, from_origin, inner_products, one_each

_COLLINEAR = 1e-12  # a squared sine; below it the arc is a line, and the sine near 180° is only rounding


def nuslerp_weights(
    models: DeltaStream, *, weights: Sequence[float] | None = None, origin: str = "zero"
) -> Float[Tensor, "2"]:
    """(2,) factors of the two models, as vectors from the origin."""
    products = inner_products(from_origin(models, origin))
    one, two = weights or (1.0, 1.0)
    t = 0.5 if abs(one + two) < 1e-6 else two / (one + two)
    norms = products.diagonal().sqrt().clamp_min(1e-7)
    cosine = (products[0, 1] / norms.prod()).clamp(-1, 1)
    if 1 - cosine.square() <= _COLLINEAR:
        return torch.tensor([1 - t, t], dtype=torch.float64)
    angle = cosine.acos()
    return torch.stack([((1 - t) * angle).sin(), (t * angle).sin()]) / angle.sin()


@merge_method(paper="https://arxiv.org/abs/2403.13257", gather=nuslerp_weights, num_models=(2, 2))
def nuslerp(
    base: Float[Tensor, " *shape"],
    models: Float[Tensor, " task *shape"],
    statistic: Float[Tensor, "2"] | None = None,
    *,
    weights: Sequence[float] | None = None,
    origin: Literal["zero", "base"] = "zero",
) -> Float[Tensor, " *shape"]:
    """Go along the arc from one model to the other by the share of the other's weight, tensor by tensor.

    `weights`: (2,) equal by default. `origin=base` follows the arc between the task vectors; otherwise the base takes
    no part. Without a `statistic` (the two factors) it is computed from the tensors given.

    >>> nuslerp(torch.zeros(2), torch.tensor([[1.0, 0.0], [0.0, 1.0]]), weights=[1.0, 2.0])
    tensor([0.5000, 0.8660])
    """
    one_each(weights or (1.0, 1.0), 2, "weights")
    if statistic is None:
        statistic = nuslerp_weights(OneTensor(models, base), weights=weights, origin=origin)
    return combined(statistic, models, base, origin)
