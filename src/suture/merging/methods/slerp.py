"""SLERP, Shoemake 1985, as model mergers use it: https://arxiv.org/abs/2403.13257"""

from typing import Annotated

import torch
from annotated_types import Ge, Le
from jaxtyping import Float
from torch import Tensor

from suture.merging.registry import merge_method
from suture.merging.streams import DeltaStream, OneTensor, combination, inner_products

_PARALLEL = 0.9995  # beyond this cosine the arc is a line


def slerp_weights(models: DeltaStream, *, t: float = 0.5) -> Float[Tensor, "2"]:
    """(2,) factors of base and model, from the angle between the two tensors."""
    products = inner_products(models, with_base=True)
    norms = products.diagonal().sqrt()
    cosine = (products[0, 1] / torch.where(norms > 1e-8, norms, 1.0).prod()).clamp(-1, 1)
    if cosine.abs() > _PARALLEL:
        return torch.tensor([1 - t, t], dtype=torch.float64)
    angle = cosine.acos()
    return torch.stack([((1 - t) * angle).sin(), (t * angle).sin()]) / angle.sin()


@merge_method(paper="https://arxiv.org/abs/2403.13257", gather=slerp_weights, num_models=(1, 1))
def slerp(
    base: Float[Tensor, " *shape"],
    models: Float[Tensor, " task *shape"],
    statistic: Float[Tensor, "2"] | None = None,
    *,
    t: Annotated[float, Ge(0), Le(1)] = 0.5,
) -> Float[Tensor, " *shape"]:
    """Go a share `t` of the way along the arc from the base to the one model, tensor by tensor.

    Tensors that are nearly parallel or opposite are interpolated on a line. Without a `statistic` (the two factors) it
    is computed from the tensors given.

    >>> slerp(torch.tensor([1.0, 0.0]), torch.tensor([[0.0, 1.0]]), t=0.5)
    tensor([0.7071, 0.7071])
    """
    if statistic is None:
        statistic = slerp_weights(OneTensor(models, base), t=t)
    return combination(statistic, torch.cat([base[None], models]))
