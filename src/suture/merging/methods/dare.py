"""DARE: drop and rescale. https://arxiv.org/abs/2311.03099"""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from annotated_types import Gt, Le
from jaxtyping import Float
from torch import Tensor

from suture.merging.counter_random import SlicePosition, chosen, default_position, uniforms
from suture.merging.registry import merge_method
from suture.merging.streams import one_each, weighted

Density = Annotated[float, Gt(0), Le(1)]


@merge_method(paper="https://arxiv.org/abs/2311.03099", scale="scaling_factor")
def dare(
    base: Float[Tensor, " *shape"],
    deltas: Float[Tensor, " task *shape"],
    position: SlicePosition | None = None,
    *,
    scaling_factor: float = 0.3,
    density: Density | Sequence[Density] = 0.5,
    rescale: bool = True,
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> Float[Tensor, " *shape"]:
    """Keep each entry of the task vectors with probability `density`, divided by it, and add their sum, scaled.

    The choice depends on the seed, the names of model and tensor, and the entry's `position`, so it is the same for
    every order of named models and number of threads; models in a list are named by their number. A token table that is
    tied to the output layer is drawn alike in memory and from files, whichever of its names they hold. `rescale=False`
    does not divide by `density`, which may be one value per model; `weights`: (task,) multiply the task vectors.

    >>> import torch
    >>> dare(torch.zeros(4), torch.ones(1, 4), scaling_factor=1.0)
    tensor([0., 2., 2., 2.])
    """
    dropped = weighted(drop(deltas, density, seed, position, rescale), weights)
    return dropped.sum(0).mul_(scaling_factor).add_(base)


def drop(
    deltas: Float[Tensor, " task *shape"],
    density: float | Sequence[float] | Float[Tensor, " task *shape"],
    seed: int,
    position: SlicePosition | None = None,
    rescale: bool = True,
) -> Float[Tensor, " task *shape"]:
    """The task vectors with each entry kept with probability `density`, and divided by it with `rescale`."""
    position, count = position or default_position(deltas), deltas[0].numel()
    if isinstance(density, Tensor):
        drawn = uniforms(seed, position, count).view(deltas.shape).to(deltas.device)
        thinned = torch.lt(drawn, density, out=drawn).to(deltas.dtype).mul_(deltas)
        return thinned.div_(density) if rescale else thinned
    thinned = torch.empty_like(deltas, memory_format=torch.contiguous_format)
    divisors = torch.tensor(one_each(density, len(deltas), "density"), dtype=deltas.dtype).tolist()
    # a single density is rounded to float32, like the numbers it is compared with
    shares = [float(np.float32(d)) for d in divisors] if isinstance(density, int | float) else divisors
    flat, source = thinned.view(len(deltas), -1), deltas.reshape(len(deltas), -1)
    for row, start, run in chosen(seed, position, count, shares):
        part, whole = (rows[row, start : start + len(run)] for rows in (flat, source))
        if deltas.device.type == "cpu":
            with np.errstate(invalid="ignore"):  # Inf, where it is allowed
                np.multiply(run, whole.numpy(), out=part.numpy())  # by 1 or 0: faster than a mask, and than torch's
        else:
            torch.mul(torch.from_numpy(run).to(deltas.device), whole, out=part)
        if rescale:
            part.div_(divisors[row])
    return thinned
