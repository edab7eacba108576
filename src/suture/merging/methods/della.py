"""DELLA: drop by magnitude, elect, fuse. https://arxiv.org/abs/2406.11617"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor

from suture.errors import ConfigError
from suture.merging.counter_random import Place
from suture.merging.methods.dare import Density, drop
from suture.merging.methods.dare_ties import elect_and_merge, l1_passes
from suture.merging.registry import merge_method
from suture.merging.streams import DeltaStream, OneTensor, l1_ratios, per_row

Epsilon = Annotated[float, Ge(0)]


def della_ratios(
    deltas: DeltaStream,
    *,
    density: float | Sequence[float] = 0.5,
    epsilon: float | Sequence[float] = 0.1,
    rescale: bool | str = True,
    seed: int = 0,
    **_,
) -> Float[Tensor, " task"]:
    """Σ|δ| over Σ|δ that stays|, for each task; 1 and no pass unless what stays is scaled by it."""
    if rescale != "l1":
        return torch.ones(len(deltas.sample(1)), dtype=torch.float64)
    thinned = lambda place, rows: drop(rows, _keep_probabilities(rows, density, epsilon), seed, place, rescale=False)
    return l1_ratios(deltas, thinned)


@merge_method(paper="https://arxiv.org/abs/2406.11617", gather=della_ratios, whole_rows=True, passes=l1_passes)
def della(
    base: Float[Tensor, " *shape"],
    deltas: Float[Tensor, " task *shape"],
    statistic: Float[Tensor, " task"] | None = None,
    place: Place | None = None,
    *,
    scaling_factor: float = 1.0,
    density: Density | Sequence[Density] = 0.5,
    epsilon: Epsilon | Sequence[Epsilon] = 0.1,
    merge_func: Literal["sum", "mean", "max"] = "mean",
    rescale: bool | Literal["l1"] = True,
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> Float[Tensor, " *shape"]:
    """Drop entries at random, small ones more often, rescale, elect a sign per column and merge as TIES does.

    In each row of a matrix (a vector is one row) the probability to stay rises with the rank of the magnitude, from
    density − epsilon to density + epsilon; what stays is divided by its probability. `rescale`, randomness,
    `density`, which may be one for each model like `epsilon`, and `weights` as in `dare_ties`.

    >>> base, deltas = torch.zeros(3), torch.tensor([[4.0, 1.0, -3.0], [2.0, -5.0, -1.0]])
    >>> della(base, deltas, density=1.0, epsilon=0.0)
    tensor([ 3., -5., -2.])
    """
    thinned = magnitude_drop(deltas, statistic, place, density=density, epsilon=epsilon, rescale=rescale, seed=seed)
    return elect_and_merge(base, thinned, merge_func=merge_func, scaling_factor=scaling_factor, weights=weights)


def magnitude_drop(
    deltas: Float[Tensor, " task *shape"],
    statistic: Float[Tensor, " task"] | None,
    place: Place | None,
    *,
    density: float | Sequence[float],
    epsilon: float | Sequence[float],
    rescale: bool | str,
    seed: int,
) -> Float[Tensor, " task *shape"]:
    """DELLA's first step: the task vectors without what is dropped, rescaled."""
    if statistic is None:
        told = {"density": density, "epsilon": epsilon, "rescale": rescale, "seed": seed}
        statistic = della_ratios(OneTensor(deltas, place=place), **told)
    dropped = drop(deltas, _keep_probabilities(deltas, density, epsilon), seed, place, rescale is True)
    return dropped.mul_(per_row(statistic.tolist(), dropped, "ratio")) if rescale == "l1" else dropped


def _keep_probabilities(deltas: Tensor, density: float | Sequence[float], epsilon: float | Sequence[float]) -> Tensor:
    """density − ε for the smallest magnitude of a row, density + ε for the largest, evenly spaced by rank between."""
    for told, knob in ((density, "density"), (epsilon, "epsilon")):
        per_row(told, deltas, knob)  # one for each model, or a line that says so
    _check_range(density, epsilon)
    rows = deltas.flatten(2) if deltas.ndim > 2 else deltas.reshape(len(deltas), 1, -1)
    order = rows.abs().argsort(dim=-1, stable=True)
    ramp = lambda reach: torch.linspace(-reach, reach, rows.shape[-1], dtype=rows.dtype) * (rows.shape[-1] > 1)
    steps = ramp(epsilon) if isinstance(epsilon, int | float) else torch.stack([ramp(e) for e in epsilon])[:, None]
    steps = steps.to(rows.device) + per_row(density, rows, "density")
    return torch.empty_like(rows).scatter_(-1, order, steps.expand_as(rows)).view(deltas.shape)


def _check_range(density: float | Sequence[float], epsilon: float | Sequence[float]) -> None:
    listed = lambda told, other: [told] * (1 if isinstance(other, int | float) else len(other))
    densities = listed(density, epsilon) if isinstance(density, int | float) else density
    epsilons = listed(epsilon, densities) if isinstance(epsilon, int | float) else epsilon
    if any(d - e <= 0 or d + e > 1 for d, e in zip(densities, epsilons, strict=False)):
        raise ConfigError(
            f"method.density={density} ± method.epsilon={epsilon} leaves the range of probabilities (0, 1]."
        )
