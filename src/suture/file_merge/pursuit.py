"""Orthogonal matching pursuit: vectors as sums of a few rows of a table, the rows chosen one after another.

https://arxiv.org/abs/2506.06607 uses it to carry embeddings of tokens from one model to another.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

#: Some rows of a table: (first, last) → (rows, entries), float32.
Rows = Callable[[int, int], Float[Tensor, "rows entry"]]

_BLOCK = 1 << 22  # entries of the table that are compared at once, and cosines that are held at once
_TINY = torch.finfo(torch.float32).tiny
_SMALL = 1e-6  # of a target's norm: a residual that is nothing but rounding


class Sums(NamedTuple):
    """The sums that come nearest: the chosen rows of each target, their coefficients, and what is left of its norm.

    A coefficient of 0 fills up targets that fewer rows reach.
    """

    chosen: Int[Tensor, "target atom"]
    coefficients: Float[Tensor, "target atom"]
    residuals: Float[Tensor, "target step"]


def pursue(targets: Float[Tensor, "target entry"], rows: Rows, count: int, atoms: int) -> Sums:
    """Each target as a sum of at most `atoms` of the `count` rows.

    Every step takes the row with the largest cosine with what is left, and leaves what is orthogonal to all rows that
    are taken (Gram-Schmidt), so that the residual, relative to the target's norm, never grows.
    """
    atoms = min(atoms, count, targets.shape[1])
    sizes = targets.norm(dim=1).clamp(min=_TINY)
    basis = torch.zeros(len(targets), atoms, targets.shape[1])
    triangle = torch.eye(atoms, dtype=torch.float64).repeat(len(targets), 1, 1)
    chosen = torch.zeros(len(targets), atoms, dtype=torch.long)
    along, residuals, left = torch.zeros(len(targets), atoms), torch.ones(len(targets), atoms), targets.clone()
    for step in range(atoms):
        best = _nearest(left, rows, count)
        taken = _gather(rows, best)
        rest, shares = _orthogonal(taken, basis[:, :step])
        size = rest.norm(dim=1)
        used = (left.norm(dim=1) > _SMALL * sizes) & (size > _SMALL * taken.norm(dim=1))
        chosen[:, step] = torch.where(used, best, 0)
        basis[:, step] = torch.where(used[:, None], rest / size.clamp(min=_TINY)[:, None], 0.0)
        triangle[:, :step, step] = torch.where(used[:, None], shares, 0.0).double()
        triangle[:, step, step] = torch.where(used, size, 1.0).double()
        along[:, step] = (basis[:, step] * left).sum(1)
        left = left - along[:, step, None] * basis[:, step]
        residuals[:, step] = left.norm(dim=1) / sizes
    found = torch.linalg.solve_triangular(triangle, along.double()[:, :, None], upper=True)
    return Sums(chosen, found[:, :, 0].float(), residuals)


def _orthogonal(taken: Tensor, basis: Float[Tensor, "target atom entry"]) -> tuple[Tensor, Tensor]:
    """The part of the vectors that is orthogonal to a basis, and their shares of it; twice, against rounding."""
    shares = torch.zeros(basis.shape[:2])
    for _ in range(2):
        more = torch.einsum("tae,te->ta", basis, taken)
        taken = taken - torch.einsum("ta,tae->te", more, basis)
        shares = shares + more
    return taken, shares


def _nearest(left: Float[Tensor, "target entry"], rows: Rows, count: int) -> Int[Tensor, " target"]:
    """The row with the largest cosine, up to its sign."""
    largest, best = torch.full((len(left),), -1.0), torch.zeros(len(left), dtype=torch.long)
    step = max(1, _BLOCK // max(1, *left.shape))
    for first in range(0, count, step):
        table = rows(first, min(first + step, count))
        table = table / table.norm(dim=1, keepdim=True).clamp(min=_TINY)
        found, where = (left @ table.T).abs().max(1)
        best = torch.where(found > largest, where + first, best)
        largest = torch.maximum(found, largest)
    return best


def _gather(rows: Rows, numbers: Int[Tensor, " target"]) -> Float[Tensor, "target entry"]:
    return torch.cat([rows(number, number + 1) for number in numbers.tolist()])
