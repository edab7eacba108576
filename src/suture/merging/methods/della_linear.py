"""DELLA without the election of signs, as in mergekit. https://arxiv.org/abs/2406.11617"""

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from suture.merging.counter_random import SlicePosition
from suture.merging.methods.dare import Density
from suture.merging.methods.dare_ties import l1_passes
from suture.merging.methods.della import Epsilon, della_ratios, magnitude_drop
from suture.merging.registry import merge_method
from suture.merging.streams import weighted


@merge_method(
    paper="https://arxiv.org/abs/2406.11617",
    scale="scaling_factor",
    gather=della_ratios,
    whole_rows=True,
    passes=l1_passes,
)
def della_linear(
    base: Float[Tensor, " *shape"],
    deltas: Float[Tensor, " task *shape"],
    statistic: Float[Tensor, " task"] | None = None,
    position: SlicePosition | None = None,
    *,
    scaling_factor: float = 0.3,
    density: Density | Sequence[Density] = 0.5,
    epsilon: Epsilon | Sequence[Epsilon] = 0.1,
    rescale: bool | Literal["l1"] = True,
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> Float[Tensor, " *shape"]:
    """Drop entries by magnitude as `della` does and add the sum of the rest, scaled.

    `weights`: (task,) multiply the task vectors; the other knobs are those of `della`.

    >>> import torch
    >>> base, deltas = torch.zeros(3), torch.tensor([[4.0, 1.0, -3.0], [2.0, -5.0, -1.0]])
    >>> della_linear(base, deltas, scaling_factor=0.5, density=1.0, epsilon=0.0)
    tensor([ 3., -2., -2.])
    """
    thinned = magnitude_drop(deltas, statistic, position, density=density, epsilon=epsilon, rescale=rescale, seed=seed)
    return base + scaling_factor * weighted(thinned, weights).sum(0)
