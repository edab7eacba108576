"""Multi-SLERP: the mean direction of several models on a sphere, and their mean norm, as in mergekit.

The description has a step in the tangent space at the mean direction. The weighted tangents sum to zero there, so the
step is left out.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from suture.errors import ConfigError
from suture.merging.registry import merge_method
from suture.merging.streams import DeltaStream, OneTensor, combined, from_origin, inner_products, one_each

_EPS = 1e-8


def multislerp_weights(
    models: DeltaStream,
    *,
    weights: Sequence[float] | None = None,
    normalize: bool = True,
    origin: str = "zero",
) -> Float[Tensor, " task"]:
    """(task,) factors of the models, as vectors from the origin."""
    products = inner_products(from_origin(models, origin))
    norms = products.diagonal().sqrt()
    shares = torch.tensor(list(one_each(weights or 1.0, len(norms), "weights")), dtype=norms.dtype)
    shares = shares / shares.sum() if normalize else shares
    units = shares / (norms + _EPS)
    length = (units @ products @ units).clamp_min(0).sqrt()
    if not length < _EPS:  # NaN passes too; the check of the merged slice names the tensor
        return units / length * (norms @ shares)
    if not norms.any() or len(norms) == 2:
        return shares
    raise ConfigError("multislerp: the models' directions cancel under these weights. Remedy: give other weights.")


@merge_method(paper="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea", gather=multislerp_weights)
def multislerp(
    base: Float[Tensor, " *shape"],
    models: Float[Tensor, " task *shape"],
    statistic: Float[Tensor, " task"] | None = None,
    *,
    weights: Sequence[float] | None = None,
    normalize: bool = True,
    origin: Literal["zero", "base"] = "zero",
) -> Float[Tensor, " *shape"]:
    """Average the directions of the models' tensors by their weights, and their norms.

    `normalize` scales the weights to sum to 1. `origin=base` averages the task vectors; otherwise the base takes no
    part. Two models whose directions cancel are averaged on a line. Without a `statistic` (one factor per model) it is
    computed from the tensors given.

    >>> multislerp(torch.zeros(2), torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    tensor([1.4142, 1.4142])
    """
    if statistic is None:
        statistic = multislerp_weights(OneTensor(models, base), weights=weights, normalize=normalize, origin=origin)
    return combined(statistic, models, base, origin)
