"""TALL masks, https://arxiv.org/abs/2405.07813, and EMR-Merging, https://arxiv.org/abs/2405.17461, streamed."""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from suture.checkpoints import Source, allocate_checkpoint
from suture.errors import ConfigError
from suture.merging.methods.consensus import MASK_THRESHOLD, tall_mask
from suture.merging.methods.ties_merging import settled_statistic, ties_rows
from suture.merging.overflow import refuse_overflow
from suture.merging.streams import one_each
from suture.merging.task_masks import BITS, SCALES, UPDATE, TaskMasks, facts, mask_specs
from suture.merging.task_vectors import Piece, TaskVectors, open_task_vectors
from suture.merging.tensorwise import refuse_non_finite

Over = Literal["sum", "ties"]


class Masked(NamedTuple):
    """One slice: `update` (entries,) and `mask` (task, entries)."""

    update: Float[Tensor, " entries"]
    mask: Bool[Tensor, "task entries"]


def tall_masks(
    base: Source,
    models: Mapping[str, Source] | Sequence[Source],
    *,
    mask_threshold: float | Sequence[float] = MASK_THRESHOLD,
    over: Over = "sum",
    frozen: Sequence[str] = (),
    mixed_dtypes: bool = False,
    threads: int = 0,
    path: str | os.PathLike[str] | None = None,
) -> TaskMasks:
    """TALL masks: a task takes an entry of Σ_s τ_s where |τ_t| > λ |Σ_s τ_s − τ_t|, λ the `mask_threshold`.

    `over="ties"` puts TIES's merged task vector at scale 1 in the place of the sum. The authors choose λ for each task
    from .2 to .6 on labelled inputs; here it is one number, or one per task. With a `path` the masks are written there
    slice by slice, and nothing of the size of a model is held in memory. Raises `IncompatibleModels` as `merge` does.
    """
    vectors = open_task_vectors(base, models, frozen=frozen, mixed_dtypes=mixed_dtypes, threads=threads)
    return tall_masks_of(vectors, mask_threshold, path, over)


def emr_masks(
    base: Source,
    models: Mapping[str, Source] | Sequence[Source],
    *,
    frozen: Sequence[str] = (),
    mixed_dtypes: bool = False,
    threads: int = 0,
    path: str | os.PathLike[str] | None = None,
) -> TaskMasks:
    """EMR-Merging: elect the sign of Σ_s τ_s, unify to the largest magnitude with that sign, mask, and rescale.

    A sum of 0 elects −1. A task takes the entries where its own sign is the elected one, times γ_t = Σ mean |τ_t| over
    Σ mean |m_t ⊙ u|, the means of each tensor, summed over the tensors, as in the published code. `path` and errors as
    in `tall_masks`.
    """
    vectors = open_task_vectors(base, models, frozen=frozen, mixed_dtypes=mixed_dtypes, threads=threads)
    return emr_masks_of(vectors, path)


def tall_masks_of(
    vectors: TaskVectors,
    mask_threshold: float | Sequence[float],
    path: str | os.PathLike[str] | None = None,
    over: Over = "sum",
) -> TaskMasks:
    """As `tall_masks`, for models that are open and checked."""
    thresholds = one_each(mask_threshold, len(vectors.models), "mask_threshold")
    if not all(math.isfinite(each) and each >= 0 for each in thresholds):
        raise ConfigError(f"method.mask_threshold={mask_threshold}: wanted finite numbers, 0 or more.")

    statistic = settled_statistic(vectors) if over == "ties" else None

    def mask(piece: Piece, deltas: Tensor) -> Masked:
        total = (deltas if statistic is None else ties_rows(deltas, statistic)).sum(0)
        return Masked(total, tall_mask(deltas, total, mask_threshold))

    with _allocated(vectors, "tall_masks", path) as tensors:
        _mask_all(vectors, mask, tensors)
        tensors[SCALES].fill_(1.0)
    return _opened(vectors, "tall_masks", tensors, path)


def emr_masks_of(vectors: TaskVectors, path: str | os.PathLike[str] | None = None) -> TaskMasks:
    """As `emr_masks`, for models that are open and checked."""
    parts: dict[str, list[list[list[float]]]] = {name: [] for name in vectors.names}

    def mask(piece: Piece, deltas: Tensor) -> Masked:
        side = torch.where(deltas.sum(0) > 0, 1.0, -1.0).to(deltas.dtype)
        aligned = deltas * side
        masked = Masked(aligned.amax(0).clamp_min_(0).mul_(side), aligned > 0)
        taken = (masked.update.abs().double() * each for each in masked.mask)
        sums = deltas.abs().sum(1, dtype=torch.float64).tolist(), [each.sum().item() for each in taken]
        parts[piece.name].append(list(sums))
        return masked

    with _allocated(vectors, "emr_merging", path) as tensors:
        _mask_all(vectors, mask, tensors)
        tensors[SCALES].copy_(_rescalers(vectors, parts))
    return _opened(vectors, "emr_merging", tensors, path)


def _rescalers(vectors: TaskVectors, parts: Mapping[str, list[list[list[float]]]]) -> Float[Tensor, " task"]:
    """γ_t from each slice's Σ |τ_t| and Σ |m_t ⊙ u|; 0 for a task that did not change anything."""
    means = torch.zeros(2, len(vectors.models), dtype=torch.float64)
    for name in sorted(name for name, slices in parts.items() if slices):
        sums = torch.tensor(sorted(parts[name]), dtype=torch.float64).flatten(1).T.tolist()  # whatever their order
        total = torch.tensor(list(map(math.fsum, sums)), dtype=torch.float64).view(2, -1)
        means += total / vectors.base.specs[name].numel
    return torch.where(means[1] > 0, means[0] / means[1].clamp_min(torch.finfo(torch.float64).tiny), 0.0)


@contextmanager
def _allocated(vectors: TaskVectors, kind: str, path: str | os.PathLike[str] | None) -> Iterator[dict[str, Tensor]]:
    """The tensors to fill in: in memory, or those of a new file."""
    specs = mask_specs(vectors.base, vectors.names, len(vectors.models))
    if path is None:
        yield {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
        return
    described = facts(kind, list(vectors.models), vectors.base, vectors.names)
    with allocate_checkpoint(specs, path, described) as tensors:
        yield tensors


def _opened(
    vectors: TaskVectors, kind: str, tensors: Mapping[str, Tensor], path: str | os.PathLike[str] | None
) -> TaskMasks:
    if path is not None:
        return TaskMasks.load(path, vectors.base)
    update, bits = ({name: tensors[part + name] for name in vectors.names} for part in (UPDATE, BITS))
    return TaskMasks(kind, tuple(vectors.models), vectors.base, update, bits, tensors[SCALES])


def _mask_all(vectors: TaskVectors, mask: Callable[[Piece, Tensor], Masked], tensors: Mapping[str, Tensor]) -> None:
    """Fill in update and bits of every tensor, slice by slice, on several threads."""

    def write(piece: Piece, base: Tensor, deltas: Tensor) -> None:
        refuse_non_finite(vectors, piece, base, deltas)
        masked = mask(piece, deltas)
        stored = masked.update.to(tensors[UPDATE + piece.name].dtype)
        refuse_overflow(piece.name, masked.update, stored, start=piece.start)
        tensors[UPDATE + piece.name].view(-1)[piece.start : piece.stop] = stored
        packed = np.packbits(masked.mask.numpy(), axis=1, bitorder="little")
        tensors[BITS + piece.name][:, piece.start // 8 : -(-piece.stop // 8)] = torch.from_numpy(packed)

    with vectors.workers():
        for name in vectors.names:
            vectors.each_of(_whole_bytes(vectors, name), write)


def _whole_bytes(vectors: TaskVectors, name: str) -> list[Piece]:
    """The slices of a tensor, none of which shares a byte of bits with another."""
    numel = vectors.base.specs[name].numel
    length = max(8, max((piece.stop - piece.start for piece in vectors.pieces(name)), default=0) // 8 * 8)
    return [Piece(name, start, min(start + length, numel)) for start in range(0, numel, length)]
