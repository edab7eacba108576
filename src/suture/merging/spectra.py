"""Singular vectors and polar factors in float64 that no rounding of a null direction can change.

The eigenvectors of the smaller Gram matrix cost less than half of a singular value decomposition, and are as exact
where no singular value that counts is small. Where one is, and for small matrices, the decomposition itself is used.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

NEGLIGIBLE = 1e-6  # of a norm: singular values below it are noise, and so are their directions
_SMALL = 64  # the side up to which a decomposition costs nothing
_LEADING = 1e-3  # of the largest: a Gram matrix finds singular values above it, and their directions, to 1e-10
_CONDITION = 1e-4  # of the largest: the least singular value for which a Gram matrix gives the polar factor


class Singular(NamedTuple):
    """Left vectors (out, k), values (k,) in descending order, and right vectors (in, k)."""

    left: Float[Tensor, "out k"]
    values: Float[Tensor, " k"]
    right: Float[Tensor, "inner k"]


def largest_norm(deltas: Float[Tensor, "task out inner"]) -> float:
    """max‖Δ‖ over tasks, which singular values of this tensor are compared with."""
    return max(float(delta.double().norm()) for delta in deltas)


def leading(matrix: Float[Tensor, "out inner"], count: int, floor: float) -> Singular:
    """The first `count` singular vectors and values of a float64 matrix, of those above `floor`."""
    found = _from_gram(matrix, count) if min(matrix.shape) > _SMALL else None
    if found is None:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        found = Singular(left[:, :count], values[:count], right[:count].mT)
    kept = int((found.values > floor).sum())
    return Singular(found.left[:, :kept], found.values[:kept], found.right[:, :kept])


def _from_gram(matrix: Tensor, count: int) -> Singular | None:
    """The same through the smaller Gram matrix; None where a value is too small for that."""
    tall = matrix.shape[0] >= matrix.shape[1]
    squares, vectors = torch.linalg.eigh(matrix.mT @ matrix if tall else matrix @ matrix.mT)
    squares, vectors = squares[-count:].flip(0), vectors[:, -count:].flip(1)
    if not count or not float(squares[-1]) > _LEADING**2 * float(squares[0]):
        return None
    values = squares.sqrt()
    others = (matrix @ vectors if tall else matrix.mT @ vectors) / values
    return Singular(others, values, vectors) if tall else Singular(vectors, values, others)


def polar(matrix: Float[Tensor, "out inner"]) -> Float[Tensor, "out inner"]:
    """The polar factor Σ p qᵀ of a float64 matrix, over singular values above 1e-6 of its norm."""
    return polar_and_mean(matrix)[0]


def polar_and_mean(matrix: Float[Tensor, "out inner"]) -> tuple[Float[Tensor, "out inner"], float]:
    """The polar factor, and the mean of all min(out, in) singular values."""
    if min(matrix.shape) > _SMALL and (found := _polar_from_gram(matrix)):
        return found
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    kept = int((values > NEGLIGIBLE * values.norm()).sum())
    return left[:, :kept] @ right[:kept], float(values.mean()) if len(values) else 0.0


def _polar_from_gram(matrix: Tensor) -> tuple[Tensor, float] | None:
    """X(XᵀX)^-½, with one step of Newton and Schulz for the rounding of small values; None for ill-conditioned X."""
    tall = matrix.shape[0] >= matrix.shape[1]
    squares, vectors = torch.linalg.eigh(matrix.mT @ matrix if tall else matrix @ matrix.mT)
    if not float(squares[0]) > max(_CONDITION**2 * float(squares[-1]), NEGLIGIBLE**2 * float(squares.sum())):
        return None
    values = squares.sqrt()
    root = (vectors / values) @ vectors.mT
    factor = matrix @ root if tall else root @ matrix
    gram = factor.mT @ factor if tall else factor @ factor.mT
    gram.mul_(-0.5).diagonal().add_(1.5)
    return (factor @ gram if tall else gram @ factor), float(values.mean())
