"""Iso-CTS: isotropic merging in the common and the tasks' own subspaces, https://arxiv.org/abs/2502.04959"""

from typing import Annotated

import torch
from annotated_types import Ge, Le
from jaxtyping import Float
from torch import Tensor

from suture.merging.registry import matrix_method
from suture.merging.spectra import (
    NEGLIGIBLE,
    Singular,
    concatenated,
    largest_norm,
    leading,
    leading_and_rest,
    polar,
    summed,
)


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
    total = summed(deltas)
    shared, rest = leading_and_rest(total, rank - each * tasks, floor)
    parts = (_outside(delta.double(), shared.left, rest, each, floor) for delta in (deltas if each else ()))
    own = concatenated(parts, total if rest is None else total[: rest.shape[1]], each * tasks)
    left = polar(own.left)  # orthogonal to the common directions, and so are these
    left = torch.cat([shared.left, left if rest is None else rest @ left], -1)
    singular = (shared.values.sum() + own.values.sum()) / rank
    return left.mul_(singular) @ polar(torch.cat([shared.right, own.right], -1)).mT


def _outside(delta: Tensor, common: Tensor, rest: Tensor | None, count: int, floor: float) -> Singular:
    """The first directions of what is orthogonal to `common` on the left; left vectors in the basis `rest`, if given.

    Where out ≤ in this basis is small, and so is all that is decomposed.
    """
    return leading(delta - common @ (common.mT @ delta) if rest is None else rest.mT @ delta, count, floor)
