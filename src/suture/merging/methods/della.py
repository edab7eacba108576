"""DELLA: drop by magnitude, elect, fuse. https://arxiv.org/abs/2406.11617"""

from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor

from suture.errors import ConfigError
from suture.merging.counter_random import SlicePosition
from suture.merging.methods.dare import Density, drop
from suture.merging.methods.dare_ties import elect_and_merge, l1_passes
from suture.merging.registry import merge_method
from suture.merging.streams import DeltaStream, OneTensor, l1_ratios, one_each, per_row

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
    """(task,) Σ|δ| over Σ|δ after the drop|, in float64; unless `rescale` is "l1" 1, and the stream is not read."""
    if rescale != "l1":
        return torch.ones(len(deltas.sample(1)), dtype=torch.float64)

    def thinned(position: SlicePosition, rows: Tensor) -> Tensor:
        return drop(rows, _keep_probabilities(rows, density, epsilon), seed, position, rescale=False)

    return l1_ratios(deltas, thinned)


@merge_method(
    paper="https://arxiv.org/abs/2406.11617",
    scale="scaling_factor",
    gather=della_ratios,
    whole_rows=True,
    passes=l1_passes,
)
def della(
    base: Float[Tensor, " *shape"],
    deltas: Float[Tensor, " task *shape"],
    statistic: Float[Tensor, " task"] | None = None,
    position: SlicePosition | None = None,
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

    In each row of a matrix (a vector is one row) the probability to survive rises with the rank of the magnitude, from
    density − epsilon to density + epsilon; survivors are divided by their probability. `density` and `epsilon` may be
    one value per model. `rescale`, `weights` and the randomness are as in `dare_ties`.

    >>> base, deltas = torch.zeros(3), torch.tensor([[4.0, 1.0, -3.0], [2.0, -5.0, -1.0]])
    >>> della(base, deltas, density=1.0, epsilon=0.0)
    tensor([ 3., -5., -2.])
    """
    thinned = magnitude_drop(deltas, statistic, position, density=density, epsilon=epsilon, rescale=rescale, seed=seed)
    return elect_and_merge(base, thinned, merge_func=merge_func, scaling_factor=scaling_factor, weights=weights)


def magnitude_drop(
    deltas: Float[Tensor, " task *shape"],
    statistic: Float[Tensor, " task"] | None,
    position: SlicePosition | None,
    *,
    density: float | Sequence[float],
    epsilon: float | Sequence[float],
    rescale: bool | str,
    seed: int,
) -> Float[Tensor, " task *shape"]:
    """DELLA's first step: the task vectors with entries dropped by magnitude, rescaled."""
    if statistic is None:
        knobs = {"density": density, "epsilon": epsilon, "rescale": rescale, "seed": seed}
        statistic = della_ratios(OneTensor(deltas, position=position), **knobs)
    dropped = drop(deltas, _keep_probabilities(deltas, density, epsilon), seed, position, rescale is True)
    return dropped.mul_(per_row(statistic.tolist(), dropped, "ratio")) if rescale == "l1" else dropped


def _keep_probabilities(deltas: Tensor, density: float | Sequence[float], epsilon: float | Sequence[float]) -> Tensor:
    """density − ε for the smallest magnitude of a row, density + ε for the largest, evenly spaced by rank between."""
    densities = one_each(density, len(deltas), "density")
    epsilons = one_each(epsilon, len(deltas), "epsilon")
    _check_range(density, epsilon, zip(densities, epsilons, strict=True))
    rows = deltas.flatten(2) if deltas.ndim > 2 else deltas.reshape(len(deltas), 1, -1)
    order = rows.abs().argsort(dim=-1, stable=True)
    width = rows.shape[-1]
    ramps = [torch.linspace(-e, e, width, dtype=rows.dtype) * (width > 1) for e in epsilons]
    steps = torch.stack(ramps)[:, None].to(rows.device) + per_row(density, rows, "density")
    return torch.empty_like(rows).scatter_(-1, order, steps.expand_as(rows)).view(deltas.shape)


def _check_range(
    density: float | Sequence[float], epsilon: float | Sequence[float], pairs: Iterable[tuple[float, float]]
) -> None:
    if any(d - e <= 0 or d + e > 1 for d, e in pairs):
        raise ConfigError(
            f"method.density={density} ± method.epsilon={epsilon} leaves the range of probabilities (0, 1]."
        )
