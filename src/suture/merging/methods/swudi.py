"""SWUDI: the minimisation of WUDI in closed form, stopped early, https://github.com/WalkerWorldPeace/MLLMerging"""

import math
from typing import Annotated

import torch
from annotated_types import Gt, Le
from jaxtyping import Float
from torch import Tensor

from suture.merging.methods.wudi import interference, squared_norms
from suture.merging.registry import matrix_method
from suture.merging.spectra import eigenvectors, summed

FLOOR = 1e-8  # of an eigenvalue; they sum to the number of tasks


@matrix_method(paper="https://github.com/WalkerWorldPeace/MLLMerging", workspace=8, square=5)
def swudi(
    deltas: Float[Tensor, "task out inner"],
    *,
    time: Annotated[float, Gt(0)] = 1300.0,
    share: Annotated[float, Gt(0), Le(1)] | None = 0.65,
) -> Float[Tensor, "out inner"]:
    """Follow the gradient flow of WUDI's loss for some time, in the first directions of the tasks' inputs.

    With C = Σ ΔᵀΔ/‖Δ‖² = VΛVᵀ a direction of eigenvalue λ goes a share 1 − exp(−λ·`time`) of the way from the sum of
    the task vectors to the minimum. `share` is that of the directions, those of the largest λ, that move at all;
    `share=null time=300` is the soft form.

    >>> swudi(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])).float()  # no interference: the sum
    tensor([[1., 1.]])
    """
    return closed_form(deltas, lambda values: _shares(values, time, share))


def _shares(values: Tensor, time: float, share: float | None) -> Tensor:
    count = len(values) if share is None else math.ceil(share * len(values))
    return -torch.expm1(-values[:count] * time)


def closed_form(deltas: Float[Tensor, "task out inner"], shares) -> Float[Tensor, "out inner"]:
    """M₀(I − V f Vᵀ) + D V (f/λ) Vᵀ, where f = `shares(λ)`, of the first directions, for descending floored λ (in,)."""
    squares = squared_norms(deltas)
    if squares is None:
        return deltas.mean(0, dtype=torch.float64)
    values, vectors, goal, total = _spectrum(deltas, squares)
    share = shares(values.flip(0))[: vectors.shape[1]].flip(0)
    values, vectors = values[-len(share) :], vectors[:, -len(share) :]
    way = (goal @ vectors / values - total @ vectors) * share
    return total.addmm_(way, vectors.mT)


def _spectrum(deltas: Tensor, squares: list[float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """λ (in,) ascending and floored, V (in, ≤ in) of the last of them, D and M₀."""
    tasks, out, inner = deltas.shape
    if inner <= tasks * out:
        inputs, goal, total = interference(deltas, squares)
        values, vectors = eigenvectors(inputs)
        return values.clamp_min(FLOOR), vectors, goal, total
    total = summed(deltas)
    goal = torch.zeros_like(total)
    stacked = total.new_empty(tasks, out, inner)
    for row, delta, square in zip(stacked, deltas, squares, strict=True):
        row.copy_(delta)
        goal.addmm_(row @ row.mT, row, alpha=1 / square)
        row /= square**0.5
    _, singular, right = torch.linalg.svd(stacked.flatten(0, 1), full_matrices=False)
    values = total.new_full((inner,), FLOOR)
    values[-len(singular) :] = singular.flip(0).square().clamp_min(FLOOR)
    return values, right.flip(0).mT, goal, total
