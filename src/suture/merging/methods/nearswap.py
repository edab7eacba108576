"""NearSwap, from the QuartetAnemoi models: the closer two weights are, the more of the other model is taken."""

from typing import Annotated

from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor

from suture.merging.registry import merge_method


@merge_method(paper="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001", num_models=(1, 1))
def nearswap(
    base: Float[Tensor, " *shape"], deltas: Float[Tensor, " task *shape"], *, t: Annotated[float, Ge(0)] = 0.0001
) -> Float[Tensor, " *shape"]:
    """Take the model's weight where it is within `t` of the base's, and less of it the farther away it is.

    >>> import torch
    >>> nearswap(torch.zeros(3), torch.tensor([[0.1, 0.2, -0.4]]), t=0.2)
    tensor([ 0.1000,  0.2000, -0.2000])
    """
    return base + deltas[0] * (t / deltas[0].abs().clamp_min(1e-6)).clamp(0, 1)
