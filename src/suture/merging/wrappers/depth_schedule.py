"""Depth-wise schedules of a merge's scale, of which LiNeS has the straight line: https://arxiv.org/abs/2410.17146"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from suture.core.knobs import value_between
from suture.errors import ConfigError
from suture.merging.wrapping import merge_wrapper


@merge_wrapper(paper="https://arxiv.org/abs/2410.17146")
def depth_schedule(
    update: Float[Tensor, " entry"], depth: float, ratio: float, *, factors: Sequence[float] = (1.0,)
) -> Float[Tensor, " entry"]:
    """Scale the update by `factors`, from the first block to the last, with straight lines between.

    Tensors outside of the blocks take the first. `suture search groups=N` finds N of them.

    >>> import torch
    >>> depth_schedule(torch.ones(2), 0.5, 0.25, factors=[1.0, 2.0])
    tensor([1.5000, 1.5000])
    """
    if not factors:
        raise ConfigError("method.after.depth_schedule.factors=[]: wanted numbers from the first block to the last.")
    return value_between(factors, depth) * update
