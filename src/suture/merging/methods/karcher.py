"""Karcher mean: the mean of directions on a sphere, https://arxiv.org/abs/2603.04972

Every point that the iteration visits is a combination of the models, so it needs only their inner products: one pass
over the tensor, however many iterations.
"""

import math
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from jaxtyping import Float
from torch import Tensor

from suture.merging.registry import merge_method
from suture.merging.streams import DeltaStream, OneTensor, combination, inner_products

_NOISE = 1e-6  # an angle this close to 180° is only rounding of the float64 cosine


def karcher_weights(models: DeltaStream, *, max_iter: int = 10, tol: float = 1e-5) -> Float[Tensor, " task"]:
    """(task,) factors of the models whose combination is mean direction × mean norm."""
    products = inner_products(models)
    norms = products.diagonal().sqrt()
    used, weights = norms > tol, torch.zeros_like(norms)
    if used.any():
        cosines = products[used][:, used] / torch.outer(norms[used], norms[used])
        weights[used] = norms.mean() * _mean_direction(cosines, max_iter, tol) / norms[used]
    return weights


def _mean_direction(cosines: Float[Tensor, "unit unit"], max_iter: int, tol: float) -> Float[Tensor, " unit"]:
    """The mean on the sphere as a combination of the unit vectors with these cosines."""

    def length(vector: Tensor) -> Tensor:
        return (vector @ cosines @ vector).clamp_min(0).sqrt()

    opposite = math.pi - max(tol, _NOISE)
    mean = torch.full_like(cosines[0], 1 / len(cosines))
    mean = mean / length(mean) if length(mean) > tol else torch.eye(len(cosines), dtype=mean.dtype)[0]
    for _ in range(max_iter):
        dots = (cosines @ mean).clamp(-1, 1)
        angles = dots.acos()
        undirected = (angles < tol) | (angles > opposite)  # from the opposite point all directions are equally short
        pulls = torch.where(undirected, 0.0, angles / angles.sin()) / len(cosines)
        tangent = pulls - (pulls @ dots) * mean
        step = length(tangent)
        if step < tol:
            break
        mean = step.cos() * mean + step.sin() * tangent / step
        mean = mean / length(mean)
    return mean


@merge_method(paper="https://arxiv.org/abs/2603.04972", gather=karcher_weights)
def karcher(
    base: Float[Tensor, " *shape"],
    models: Float[Tensor, " task *shape"],
    statistic: Float[Tensor, " task"] | None = None,
    *,
    max_iter: Annotated[int, Ge(0)] = 10,
    tol: Annotated[float, Gt(0)] = 1e-5,
) -> Float[Tensor, " *shape"]:
    """Average the directions of the models' tensors on the sphere, and their norms; the base takes no part.

    A model exactly opposite to the mean does not move it. Without a `statistic` (one factor per model) it is computed
    from the tensors given.

    >>> karcher(torch.zeros(2), torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    tensor([1.4142, 1.4142])
    """
    if statistic is None:
        statistic = karcher_weights(OneTensor(models), max_iter=max_iter, tol=tol)
    return combination(statistic, models)
