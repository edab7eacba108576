"""WUDI-Merging: interference removed by gradient descent, https://arxiv.org/abs/2503.08099"""

from typing import Annotated, Literal, NamedTuple

import torch
from annotated_types import Ge, Gt
from jaxtyping import Float
from torch import Tensor

from suture.merging.registry import matrix_method
from suture.merging.spectra import add_gram, gram, mirrored, summed

_LEAST = 1e-12  # of ‖Δ‖²: a task vector below it counts as zero
_BETAS, _EPSILON = (0.9, 0.999), 1e-8  # of Adam


class Interference(NamedTuple):
    """C = Σ ΔᵀΔ/‖Δ‖² (in, in), D = Σ ΔΔᵀΔ/‖Δ‖² (out, in), and the sum of the task vectors (out, in), in float64."""

    inputs: Float[Tensor, "inner inner"]
    goal: Float[Tensor, "out inner"]
    total: Float[Tensor, "out inner"]


def squared_norms(deltas: Float[Tensor, "task out inner"]) -> list[float] | None:
    """‖Δ‖² of every task, floored at 1e-12; None if all of them are below."""
    squares = [float(delta.double().square().sum()) for delta in deltas]
    return [max(square, _LEAST) for square in squares] if max(squares) > _LEAST else None


def interference(deltas: Float[Tensor, "task out inner"], squares: list[float]) -> Interference:
    """The sums that the loss consists of, task by task."""
    _, out, inner = deltas.shape
    total = summed(deltas)
    inputs, goal = total.new_zeros(inner, inner), torch.zeros_like(total)
    for delta, square in zip(deltas, squares, strict=True):
        delta = delta.double()
        if out < inner:
            add_gram(inputs, delta, 1 / square)
            goal.addmm_(gram(delta.mT), delta, alpha=1 / square)
        else:
            own = gram(delta)
            inputs.add_(own, alpha=1 / square)
            goal.addmm_(delta, own, alpha=1 / square)
    return Interference(mirrored(inputs), goal, total)


@matrix_method(paper="https://arxiv.org/abs/2503.08099", workspace=13, square=3)
def wudi(
    deltas: Float[Tensor, "task out inner"],
    *,
    steps: Annotated[int, Ge(1)] = 300,
    lr: Annotated[float, Gt(0)] | None = None,
    lr_scale: Literal["rms", "absolute"] = "rms",
) -> Float[Tensor, "out inner"]:
    """Minimise the tasks' interference Σ ‖(M − Δ)Δᵀ‖²/‖Δ‖² by Adam, from the sum of the task vectors.

    `lr_scale=rms`: `lr` is relative to the root mean square of that sum, by default 0.01, so that the result does not
    depend on the size of the task vectors. `lr_scale=absolute` is the authors' setting, by default 1e-5: an entry moves
    by about steps × lr at most, so where the task vectors are larger than CLIP's the result stays near the sum. The
    loop takes minutes for large models; `aswudi` has none, and is better.

    >>> wudi(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])).round(decimals=3).float()  # no interference: the sum
    tensor([[1., 1.]])
    """
    squares = squared_norms(deltas)
    if squares is None:
        return deltas.mean(0, dtype=torch.float64)
    sums = interference(deltas, squares)
    unit = float(sums.total.square().mean().sqrt()) if lr_scale == "rms" else 1.0
    return _descend(sums, steps, unit * (lr or (0.01 if lr_scale == "rms" else 1e-5)), _EPSILON * unit)


def _descend(sums: Interference, steps: int, lr: float, epsilon: float) -> Float[Tensor, "out inner"]:
    """Adam on the loss, whose gradient is 2(MC − D)."""
    merged, gradient, size = sums.total.clone(), torch.empty_like(sums.total), torch.empty_like(sums.total)
    first, second = torch.zeros_like(merged), torch.zeros_like(merged)
    for step in range(1, steps + 1):
        torch.addmm(sums.goal, merged, sums.inputs, beta=-2, alpha=2, out=gradient)
        first.lerp_(gradient, 1 - _BETAS[0])
        second.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
        torch.div(second, 1 - _BETAS[1] ** step, out=size).sqrt_().add_(epsilon)
        merged.addcdiv_(first, size, value=-lr / (1 - _BETAS[0] ** step))
    return merged
