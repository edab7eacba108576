"""The task vectors of one tensor, for all tasks: in memory, read when needed, or as low-rank factors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from suture.adaptation.options import AdaMergingOptions
from suture.adaptation.rank_masks import MaskedComponents
from suture.errors import IncompatibleModels
from suture.merging.methods.ties_merging import TiesStatistic, settled_statistic, ties_rows
from suture.merging.task_vectors import TaskVectors, compute_dtype

_CHUNK = {"cpu": 1 << 15}  # entries of each task vector that are widened at once, so that they fit in the cache
_CHUNK_ELSEWHERE = 1 << 22  # fewer, larger kernels


@runtime_checkable
class TensorVectors(Protocol):
    """The task vectors τ_t of one tensor, with the two operations that a merge and its gradient need."""

    def __len__(self) -> int: ...

    def to(self, device: torch.device) -> "TensorVectors": ...

    def combine(self, base: Tensor, column: Float[Tensor, " task"]) -> Tensor:
        """θ₀ + Σ λ_t τ_t in the base's shape and dtype."""
        ...

    def products(self, gradient: Tensor) -> Float[Tensor, " task"]:
        """⟨G, τ_t⟩ for every task, in float32, or float64 for a float64 gradient."""
        ...


@dataclass(frozen=True)
class Held:
    """Task vectors in memory, one flat row per task."""

    values: Float[Tensor, "task entry"]

    def __len__(self) -> int:
        return len(self.values)

    def to(self, device: torch.device) -> "Held":
        return Held(self.values.to(device))

    def combine(self, base: Tensor, column: Float[Tensor, " task"]) -> Tensor:
        return combine(base, self.values, column)

    def products(self, gradient: Tensor) -> Float[Tensor, " task"]:
        return inner_products(self.values, gradient)


@dataclass(frozen=True)
class Streamed:
    """Task vectors computed from the checkpoints at each use, so that none are held in memory."""

    count: int
    read: Callable[[], Float[Tensor, "task entry"]]
    device: torch.device | None = None

    def __len__(self) -> int:
        return self.count

    def to(self, device: torch.device) -> "Streamed":
        return Streamed(self.count, self.read, device)

    def combine(self, base: Tensor, column: Float[Tensor, " task"]) -> Tensor:
        return combine(base, self.read().to(self.device), column)

    def products(self, gradient: Tensor) -> Float[Tensor, " task"]:
        return inner_products(self.read().to(self.device), gradient)


@dataclass(frozen=True)
class LowRank:
    """Task vectors as factors, τ_t = B_t A_t, which are never multiplied out: ⟨G, BA⟩ = ⟨BᵀG, A⟩."""

    up: Float[Tensor, "task out rank"]
    down: Float[Tensor, "task rank in"]

    def __len__(self) -> int:
        return len(self.up)

    def to(self, device: torch.device) -> "LowRank":
        return LowRank(self.up.to(device), self.down.to(device))

    def combine(self, base: Tensor, column: Float[Tensor, " task"]) -> Tensor:
        scaled = self.up.to(base.dtype) * column.to(base)[:, None, None]
        side_by_side = scaled.permute(1, 0, 2).flatten(1)
        flat = base.reshape(self.up.shape[1], -1)
        return torch.addmm(flat, side_by_side, self.down.to(base.dtype).flatten(0, 1)).view(base.shape)

    def products(self, gradient: Tensor) -> Float[Tensor, " task"]:
        flat = gradient.reshape(self.up.shape[1], -1).to(compute_dtype(gradient.dtype))
        projected = self.up.to(flat.dtype).transpose(1, 2) @ flat
        return (projected * self.down.to(flat.dtype)).sum((1, 2))


@torch.no_grad()
def combine(base: Tensor, rows: Float[Tensor, "task entry"], column: Float[Tensor, " task"]) -> Tensor:
    """θ₀ + Σ λ_t τ_t of one tensor, in the base's shape and dtype.

    Equal coefficients multiply the sum of the task vectors, so the result is bit-identical to Task Arithmetic and TIES.
    """
    factors = column.tolist()
    if len(set(factors)) == 1:
        total = torch.zeros_like(base).view(-1)
        for row in rows:
            total += row
        total *= factors[0]
    elif rows.dtype == base.dtype:
        total = torch.mv(rows.T, column.to(rows))
    else:
        total = torch.zeros_like(base).view(-1)
        for row, factor in zip(rows, factors, strict=True):
            total.add_(row, alpha=factor)
    return base + total.view(base.shape)


def inner_products(rows: Float[Tensor, "task entry"], gradient: Tensor) -> Float[Tensor, " task"]:
    """⟨G, τ_t⟩ for every task, in float32, or float64 for a float64 gradient."""
    flat = gradient.reshape(-1).to(compute_dtype(gradient.dtype))
    if rows.dtype == flat.dtype:
        return torch.mv(rows, flat)
    products = torch.zeros(len(rows), dtype=flat.dtype, device=flat.device)
    chunk = _CHUNK.get(flat.device.type, _CHUNK_ELSEWHERE)
    for part, gradients in zip(rows.split(chunk, dim=1), flat.split(chunk), strict=True):
        products += torch.mv(part.to(flat.dtype), gradients)
    return products


def task_vector_rows(
    vectors: TaskVectors, options: AdaMergingOptions, parts: Mapping[str, slice] | None = None
) -> dict[str, TensorVectors]:
    """The task vectors of every merged tensor; those of AdaMerging++ with `plus_plus`.

    They are computed in float32 (float64 for float64 tensors) and held in `vectors_dtype` if given, or not held at all
    with `stream_vectors`; those of LoRA adapters are held as factors. Of tensors in `parts`, only these entries are
    read. Raises `IncompatibleModels` for weights that are not finite.
    """
    statistic = settled_statistic(vectors, options.threshold) if options.plus_plus else None

    def read(name: str) -> Tensor:
        part = slice(None) if parts is None else parts.get(name, slice(None))
        return _read(vectors, name, statistic, options.vectors_dtype, part)

    if options.rank_share is not None:
        return {name: _masked(vectors, name, options) for name in vectors.names}
    if options.stream_vectors:
        return {name: Streamed(len(vectors.models), partial(read, name)) for name in vectors.names}
    factors = {} if options.plus_plus or parts else {name: _factors(vectors, name) for name in vectors.names}
    return {name: factors.get(name) or Held(read(name)) for name in vectors.names}


def _masked(vectors: TaskVectors, name: str, options: AdaMergingOptions) -> TensorVectors:
    """The singular components of a matrix, or the task vectors of another tensor."""
    role, deltas = vectors.roles.of(name), _read(vectors, name, None, None)
    if role.kind != "matrix" or options.rank_share is None:
        return Held(deltas)
    return MaskedComponents.of(deltas, role, options.rank_share, options.rank_temperature)


def _factors(vectors: TaskVectors, name: str) -> LowRank | None:
    """The task vectors of one tensor as factors padded to one rank; None unless every model has factors."""
    pairs = [model.factors(name) for model in vectors.models.values()]
    if any(factors is None for factors in pairs):
        return None
    rank = max(factors.up.shape[1] for factors in pairs if factors is not None)
    padded = [(pad(f.up, (0, rank - f.up.shape[1])), pad(f.down, (0, 0, 0, rank - len(f.down)))) for f in pairs if f]
    return LowRank(*(torch.stack(side) for side in zip(*padded, strict=True)))


def _read(
    vectors: TaskVectors,
    name: str,
    statistic: TiesStatistic | None,
    dtype: torch.dtype | None,
    part: slice = slice(None),
) -> Tensor:
    base, models = vectors.flat(name)
    base = base[part].to(compute_dtype(vectors.base.specs[name].dtype))
    deltas = torch.stack([model[part].to(base.dtype) - base for model in models])
    _refuse_non_finite(name, list(vectors.models), deltas)
    return (deltas if statistic is None else ties_rows(deltas, statistic)).to(dtype or deltas.dtype)


def _refuse_non_finite(name: str, labels: Sequence[str], deltas: Float[Tensor, "task entry"]) -> None:
    if deltas.sum().isfinite():
        return
    for label, row in zip(labels, deltas, strict=True):
        if not row.isfinite().all():
            raise IncompatibleModels(
                f"'{name}' is not finite in '{label}' or in the base. Remedy: export that checkpoint again."
            )
