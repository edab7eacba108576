"""Singular vectors and polar factors in float64 that no rounding of a null direction can change.

The eigenvectors of the smaller Gram matrix cost less than half of a singular value decomposition, and are as exact
where no singular value that counts is small. Where one is, and for small matrices, the decomposition itself is used.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

NEGLIGIBLE = 1e-6  # of a norm: singular values below it are noise, and so are their directions
_SMALL = 64  # the side up to which a decomposition costs nothing
_LEADING = 1e-3  # of the largest: a Gram matrix finds singular values above it, and their directions, to 1e-10
_CONDITION = 1e-4  # of the largest: the least singular value for which a Gram matrix gives the polar factor
_EXACT = 1e-2  # of the largest: where none is below, it does so to 1e-11 without a correction
_COLUMNS = 192  # of a Gram matrix that are made at once


class Singular(NamedTuple):
    """Left vectors (out, k), values (k,) in descending order, and right vectors (in, k)."""

    left: Float[Tensor, "out k"]
    values: Float[Tensor, " k"]
    right: Float[Tensor, "inner k"]


def largest_norm(deltas: Float[Tensor, "task out inner"]) -> float:
    """max‖Δ‖ over tasks, which singular values of this tensor are compared with."""
    return max(float(delta.double().norm()) for delta in deltas)


def summed(deltas: Float[Tensor, "task out inner"]) -> Float[Tensor, "out inner"]:
    """ΣΔ in float64, without a copy of all of them in it."""
    total = deltas[0].double() if deltas.dtype != torch.float64 else deltas[0].clone()
    for delta in deltas[1:]:
        total += delta
    return total


def gram(matrix: Float[Tensor, "row column"]) -> Float[Tensor, "column column"]:
    """XᵀX, of which the products above the diagonal are copies of those below: little more than half of the work."""
    found = matrix.new_zeros(matrix.shape[1], matrix.shape[1])
    add_gram(found, matrix)
    return mirrored(found)


def add_gram(found: Float[Tensor, "column column"], matrix: Float[Tensor, "row column"], weight: float = 1.0) -> None:
    """Add `weight`·XᵀX to the lower triangle of `found`, and to some entries above it; see `mirrored`."""
    for start in range(0, matrix.shape[1], _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        found[start:, columns].addmm_(matrix[:, start:].mT, matrix[:, columns], alpha=weight)


def mirrored(found: Float[Tensor, "column column"]) -> Float[Tensor, "column column"]:
    """The symmetric matrix of this lower triangle, in its place."""
    for start in range(0, len(found), _COLUMNS):
        stop = start + _COLUMNS
        found[start:stop, stop:] = found[stop:, start:stop].mT
    return found


def eigenvectors(symmetric: Float[Tensor, "n n"]) -> tuple[Float[Tensor, " n"], Float[Tensor, "n n"]]:
    """Ascending eigenvalues and the vectors (n, n) of a symmetric matrix, which they overwrite on a CPU."""
    if symmetric.device.type != "cpu":
        return torch.linalg.eigh(symmetric)
    values = symmetric.new_empty(len(symmetric))
    return torch.linalg.eigh(symmetric.mT, out=(values, symmetric.mT))


def leading(matrix: Float[Tensor, "out inner"], count: int, floor: float) -> Singular:
    """The first `count` singular vectors and values of a float64 matrix, of those above `floor`."""
    return leading_and_rest(matrix, count, floor)[0]


def leading_and_rest(
    matrix: Float[Tensor, "out inner"], count: int, floor: float
) -> tuple[Singular, Float[Tensor, "out rest"] | None]:
    """The same, and an orthonormal basis of what is orthogonal to the left vectors; None where out > in."""
    found = _from_gram(matrix, count) if min(matrix.shape) > _SMALL else None
    if found is None:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        found = left, Singular(left[:, :count], values[:count], right[:count].mT)
    whole, (left, values, right) = found
    kept = int((values > floor).sum())
    rest = whole[:, kept:] if whole.shape[0] == whole.shape[1] else None
    return Singular(left[:, :kept], values[:kept], right[:, :kept]), rest


def concatenated(parts: Iterable[Singular], like: Tensor, most: int) -> Singular:
    """The directions of several matrices as large as `like`, at most `most` in all, beside one another.

    Their memory is taken first, since small blocks among large ones that come and go would take the place of those.
    """
    sizes = (most, like.shape[0]), (most,), (most, like.shape[1])
    left, values, right = (like.new_empty(size, dtype=torch.float64) for size in sizes)
    count = 0
    for part in parts:
        places = slice(count, count := count + len(part.values))
        left[places], values[places], right[places] = part.left.mT, part.values, part.right.mT
    return Singular(left[:count].mT, values[:count], right[:count].mT)


def _from_gram(matrix: Tensor, count: int) -> tuple[Tensor, Singular] | None:
    """All left vectors, or those of the first values, and the same; None where a value is too small for that."""
    tall = matrix.shape[0] > matrix.shape[1]
    squares, vectors = eigenvectors(gram(matrix if tall else matrix.mT))
    squares, first = squares[-count:].flip(0), vectors[:, -count:].flip(1)
    if not count or not float(squares[-1]) > _LEADING**2 * float(squares[0]):
        return None
    values = squares.sqrt()
    others = (matrix @ first if tall else matrix.mT @ first) / values
    return (others, Singular(others, values, first)) if tall else (vectors.flip(1), Singular(first, values, others))


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
    """X(XᵀX)^-½, with one step of Newton and Schulz where values are small; None for ill-conditioned X."""
    tall = matrix.shape[0] >= matrix.shape[1]
    squares, vectors = eigenvectors(gram(matrix if tall else matrix.mT))
    least, most = float(squares[0]), float(squares[-1])
    if not least > max(_CONDITION**2 * most, NEGLIGIBLE**2 * float(squares.sum())):
        return None
    values = squares.sqrt()
    vectors /= squares**0.25
    root = gram(vectors.mT)
    factor = matrix @ root if tall else root @ matrix
    if least < _EXACT**2 * most:
        correction = gram(factor if tall else factor.mT)
        correction.mul_(-0.5).diagonal().add_(1.5)
        factor = factor @ correction if tall else correction @ factor
    return factor, float(values.mean())
