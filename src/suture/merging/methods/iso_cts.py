"""Iso-CTS: isotropic merging in the common and the tasks' own subspaces, https://arxiv.org/abs/2502.04959"""

from typing import Annotated

import torch
from annotated_types import Ge, Le
from jaxtyping import Float
from torch import Tensor

from suture.merging.registry import matrix_method
from suture.merging.spectra import NEGLIGIBLE, largest_norm, leading, polar


@matrix_method(paper="https://arxiv.org/abs/2502.04959", workspace=13)
def iso_cts(
    deltas: Float[Tensor, "task out inner"], *, common: Annotated[float, Ge(0), Le(1)] = 0.8
) -> Float[Tensor, "out inner"]:
    """Join directions of the sum and directions of each task outside of them, all with one singular value.

    A share `common` of the r = min(out, in) directions are the first of the sum ΣΔ; the others are divided among the
    tasks, and come from what the first leaves of each task vector on the left side. The singular value is the sum of
    the chosen ones over r. The number of directions of the tasks is rounded to a multiple of T as in the authors' code.

    >>> iso_cts(torch.eye(2)[None], common=0.5).float()
    tensor([[1., 0.],
            [0., 1.]])
    """
    tasks, rank = len(deltas), min(deltas.shape[1:])
    each = round((rank - int(common * rank)) / tasks)  # half to even, as in the authors' code
    floor = NEGLIGIBLE * largest_norm(deltas)
    shared = leading(deltas.sum(0, dtype=torch.float64), rank - each * tasks, floor)
    found = [shared]
    for delta in deltas.unbind() if each else ():
        delta = delta.double()
        found.append(leading(delta - shared.left @ (shared.left.mT @ delta), each, floor))
    left, values, right = (torch.cat(parts, -1) for parts in zip(*found, strict=True))
    return values.sum() / rank * polar(left) @ polar(right).mT
