"""Spaces in which adapters are merged by any method, from their factors alone: Core Space, KnOTS and DC-Merge.

Every product B·A of one module is written as left · M_t · right with bases that all adapters share. A method merges
the small matrices M_t; nothing of the size of a weight is formed.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from suture.merging.merge import merge
from suture.merging.registry import MergeMethod
from suture.merging.spectra import polar

SPACES = ("core", "knots", "dc", "dc_linear")
_NULL = 1e-10  # of the largest singular value: below it a direction is rounding, and its vector arbitrary
_KNOTS = 1e-5  # of the largest singular value: what KnOTS leaves out
_SPREAD = 5.0  # the largest ratio of the first to the last singular value that DC-Merge leaves, smoothing linearly


class Pair(NamedTuple):
    """A product of low rank, up · down, in float64."""

    up: Float[Tensor, "rows rank"]
    down: Float[Tensor, "rank columns"]


class Shared(NamedTuple):
    """The matrices M_t of one module and the bases around them: left · M_t · right, without `right` where it is 1.

    `blocks` are the sizes of the diagonal blocks to which a merged M is cut; none where it stays whole.
    """

    left: Float[Tensor, "rows a"]
    inner: Float[Tensor, "task a b"]
    right: Float[Tensor, "b columns"] | None
    blocks: Sequence[int] = ()

    def pair(self, merged: Float[Tensor, "a b"]) -> Pair:
        """The factors of the result."""
        if self.blocks:
            mask = torch.block_diag(*(torch.ones(size, size, dtype=merged.dtype) for size in self.blocks))
            merged = merged * mask
        return Pair(self.left, merged) if self.right is None else Pair(self.left @ merged, self.right)


def merge_in_space(
    modules: Mapping[str, Sequence[Pair]], space: str, method: MergeMethod, knobs: Mapping[str, Any]
) -> dict[str, Pair]:
    """Module → the merged product, of module → the product of every adapter."""
    shared = {module: _SHARED[space](pairs) for module, pairs in modules.items()}
    count = len(next(iter(modules.values())))
    names = {f"{module}.weight": s.inner for module, s in shared.items() if s.inner.numel()}
    base = {name: torch.zeros_like(inner[0]) for name, inner in names.items()}
    models = {f"model_{t}": {name: inner[t].contiguous() for name, inner in names.items()} for t in range(count)}
    every = {"as_matrix": ["*"]} if method.matrices else {}
    merged = merge(base, models, method.name, **{**knobs, **every}) if names else {}
    empty = {module: s.inner.new_zeros(s.inner.shape[1:]) for module, s in shared.items()}
    return {module: s.pair(merged.get(f"{module}.weight", empty[module])) for module, s in shared.items()}


def _core(pairs: Sequence[Pair]) -> Shared:
    """Core Space (https://arxiv.org/abs/2509.17786): U of [B_1 …], V of the stacked A; M_t = Uᵀ B_t A_t V."""
    left = _left_vectors(torch.cat([pair.up for pair in pairs], 1))
    right = _left_vectors(torch.cat([pair.down for pair in pairs]).mT)
    inner = [(left.mT @ pair.up) @ (pair.down @ right) for pair in pairs]
    return Shared(left, torch.stack(inner), right.mT)


def _left_vectors(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows k"]:
    left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, values > _NULL * values[:1]]


def _knots(pairs: Sequence[Pair]) -> Shared:
    """KnOTS (https://arxiv.org/abs/2410.19735): [Δ_1 … Δ_T] = U S [V_1 … V_T]ᵀ; M_t = S V_tᵀ."""
    basis, triangle = torch.linalg.qr(torch.cat([pair.up for pair in pairs], 1))
    ranks = [pair.up.shape[1] for pair in pairs]
    parts = [piece @ pair.down for piece, pair in zip(triangle.split(ranks, 1), pairs, strict=True)]
    left, values, right = torch.linalg.svd(torch.cat(parts, 1), full_matrices=False)
    kept = values > _KNOTS * values[:1]
    rows = (values[:, None] * right)[kept]
    return Shared(basis @ left[:, kept], torch.stack(rows.chunk(len(pairs), 1)), None)


def _dc(pairs: Sequence[Pair], linear: bool) -> Shared:
    """DC-Merge (https://arxiv.org/abs/2603.06242): smoothed singular values, in the nearest orthogonal bases."""
    most = min(pairs[0].up.shape[0], pairs[0].down.shape[1]) // len(pairs)
    found = [_components(pair, most) for pair in pairs]
    smoothed = [(_smoothed(values, linear), u, v) for u, values, v in found]
    left = polar(torch.cat([u for _, u, _ in smoothed], 1))
    right = polar(torch.cat([v for _, _, v in smoothed], 1))
    inner = [(left.mT @ u * values) @ (v.mT @ right) for values, u, v in smoothed]
    return Shared(left, torch.stack(inner), right.mT, [len(values) for values, _, _ in smoothed])


def _components(pair: Pair, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first singular vectors and values of a product of low rank: (rows, k), (k,), (columns, k)."""
    (q_up, r_up), (q_down, r_down) = torch.linalg.qr(pair.up), torch.linalg.qr(pair.down.mT)
    left, values, right = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)
    count = min(most, int((values > _NULL * values[:1]).sum()))
    return q_up @ left[:, :count], values[:count], q_down @ right[:count].mT


def _smoothed(values: Float[Tensor, " k"], linear: bool) -> Float[Tensor, " k"]:
    """As many values with the same sum: all equal, or falling in equal steps by no more than 5 to 1."""
    if not linear or len(values) < 2:
        return torch.full_like(values, float(values.mean())) if len(values) else values
    steps = torch.linspace(min(_SPREAD, float(values[0] / values[-1])), 1.0, len(values), dtype=values.dtype)
    return steps * (values.sum() / steps.sum())


_SHARED = {
    "core": _core,
    "knots": _knots,
    "dc": lambda pairs: _dc(pairs, False),
    "dc_linear": lambda pairs: _dc(pairs, True),
}
