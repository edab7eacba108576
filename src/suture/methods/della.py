"""DELLA: drop by magnitude, elect, fuse. https://arxiv.org/abs/2406.11617"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor

from suture.errors import ConfigError
from suture.methods.counter_random import Place
from suture.methods.dare import Density, drop
from suture.methods.dare_ties import elect_and_merge
from suture.methods.registry import merge_method
from suture.methods.streams import per_row


@merge_method(paper="https://arxiv.org/abs/2406.11617", whole_rows=True)
def della(
    base: Float[Tensor, " *shape"],
    deltas: Float[Tensor, " task *shape"],
    place: Place | None = None,
    *,
    scaling_factor: float = 1.0,
    density: Density | Sequence[Density] = 0.5,
    epsilon: Annotated[float, Ge(0)] = 0.1,
    merge_func: Literal["sum", "mean", "max"] = "mean",
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> Float[Tensor, " *shape"]:
    """Drop entries at random, small ones more often, rescale, elect a sign per column and merge as TIES does.

    In each row of a matrix (a vector is one row) the probability to stay rises with the rank of the magnitude, from
    density − epsilon to density + epsilon; what stays is divided by its probability. Randomness,
    `density` and `weights` as in `dare_ties`.

    >>> base, deltas = torch.zeros(3), torch.tensor([[4.0, 1.0, -3.0], [2.0, -5.0, -1.0]])
    >>> della(base, deltas, density=1.0, epsilon=0.0)
    tensor([ 3., -5., -2.])
    """
    densities = [density] if isinstance(density, int | float) else density
    if min(densities) - epsilon <= 0 or max(densities) + epsilon > 1:
        raise ConfigError(
            f"method.density={density} ± method.epsilon={epsilon} leaves the range of probabilities (0, 1]."
        )
    probabilities = _keep_probabilities(deltas, density, epsilon)
    dropped = drop(deltas, probabilities, seed, place)
    return elect_and_merge(base, dropped, merge_func=merge_func, scaling_factor=scaling_factor, weights=weights)


def _keep_probabilities(deltas: Tensor, density: float | Sequence[float], epsilon: float) -> Tensor:
    """density − ε for the smallest magnitude of a row, density + ε for the largest, evenly spaced by rank between."""
    rows = deltas.flatten(2) if deltas.ndim > 2 else deltas.reshape(len(deltas), 1, -1)
    order = rows.abs().argsort(dim=-1, stable=True)
    steps = torch.linspace(-epsilon, epsilon, rows.shape[-1], dtype=rows.dtype)
    if rows.shape[-1] == 1:
        steps = torch.zeros_like(steps)
    steps = steps + per_row(density, rows, "density")
    return torch.empty_like(rows).scatter_(-1, order, steps.expand_as(rows)).view(deltas.shape)
