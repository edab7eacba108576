"""DARE: drop and rescale. https://arxiv.org/abs/2311.03099"""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from annotated_types import Gt, Le
from jaxtyping import Float
from torch import Tensor

from suture.merging.counter_random import Place, chosen, somewhere, uniforms
from suture.merging.registry import merge_method
from suture.merging.streams import per_row, weighted

Density = Annotated[float, Gt(0), Le(1)]


@merge_method(paper="https://arxiv.org/abs/2311.03099")
def dare(
    base: Float[Tensor, " *shape"],
    deltas: Float[Tensor, " task *shape"],
    place: Place | None = None,
    *,
    scaling_factor: float = 0.3,
    density: Density | Sequence[Density] = 0.5,
    rescale: bool = True,
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> Float[Tensor, " *shape"]:
    """Keep each entry of the task vectors with probability `density`, divided by it, and add their sum, scaled.

    Which entries stay depends on the seed, the model's and the tensor's name and the position (`place`), so it is the
    same for every order of named models and number of threads; models in a list are named by their place in it. A table
    of tokens that is tied to the head is drawn alike in memory and from files, whichever of its names they keep.
    `rescale=False` leaves the size of what stays. `density` may be one for each model; `weights`: (task,) multiply the
    task vectors.

    >>> import torch
    >>> dare(torch.zeros(4), torch.ones(1, 4), scaling_factor=1.0)
    tensor([0., 2., 2., 2.])
    """
    dropped = weighted(drop(deltas, density, seed, place, rescale), weights)
    return dropped.sum(0).mul_(scaling_factor).add_(base)


def drop(
    deltas: Float[Tensor, " task *shape"],
    density: float | Sequence[float] | Float[Tensor, " task *shape"],
    seed: int,
    place: Place | None = None,
    rescale: bool = True,
) -> Float[Tensor, " task *shape"]:
    """The task vectors with each entry kept with probability `density` and then divided by it."""
    place, count = place or somewhere(deltas), deltas[0].numel()
    if isinstance(density, Tensor):
        drawn = uniforms(seed, place, count).view(deltas.shape).to(deltas.device)
        kept = torch.lt(drawn, density, out=drawn).to(deltas.dtype).mul_(deltas)
        return kept.div_(density) if rescale else kept
    kept, divisors = torch.empty_like(deltas, memory_format=torch.contiguous_format), _one_each(density, deltas)
    # a single density is rounded like the numbers it is held against
    shares = [float(np.float32(d)) for d in divisors] if isinstance(density, int | float) else divisors
    flat, source = kept.view(len(deltas), -1), deltas.reshape(len(deltas), -1)
    for row, start, run in chosen(seed, place, count, shares):
        part, whole = (rows[row, start : start + len(run)] for rows in (flat, source))
        if deltas.device.type == "cpu":
            np.multiply(run, whole.numpy(), out=part.numpy())  # by 1 or 0: faster than a mask, and than torch's
        else:
            torch.mul(torch.from_numpy(run).to(deltas.device), whole, out=part)
        if rescale:
            part.div_(divisors[row])
    return kept


def _one_each(density: float | Sequence[float], deltas: Tensor) -> list[float]:
    told = per_row(density, deltas, "density").flatten().tolist()
    return told * len(deltas) if len(told) == 1 else told
