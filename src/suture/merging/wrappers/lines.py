"""LiNeS: layer-increasing scaling of a merge, https://arxiv.org/abs/2410.17146"""

from jaxtyping import Float
from torch import Tensor

from suture.merging.wrapping import merge_wrapper


@merge_wrapper(paper="https://arxiv.org/abs/2410.17146", unscaled=True)
def lines(
    update: Float[Tensor, " entry"],
    depth: float,
    ratio: float,
    *,
    alpha: float | None = None,
    beta: float = 0.2,
) -> Float[Tensor, " entry"]:
    """Scale the update of the first block by `alpha`, that of the last by `alpha + beta`, and on a line between.

    The update is the method's own at scale 1. By default `alpha` is `ratio`, ‖ΣΔ‖₁/‖M‖₁/T over the whole model: 1/T for
    Task Arithmetic. Tensors outside of the blocks (`depth` 0) take `alpha`. For one task give alpha and 1 − alpha.

    >>> import torch
    >>> lines(torch.ones(2), 0.5, 0.25, beta=0.5)
    tensor([0.5000, 0.5000])
    """
    return ((ratio if alpha is None else alpha) + beta * depth) * update
