"""Run one method over a whole model: slice by slice, in bounded memory, into tensors that are already allocated."""

import threading
from collections import defaultdict
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from suture.checkpoints import Source
from suture.errors import IncompatibleModels
from suture.methods import MergeMethod, get_method, settle
from suture.task_vectors import Piece, TaskVectors, open_task_vectors


def merge(
    base: Source,
    models: Mapping[str, Source] | Sequence[Source],
    method: str = "task_arithmetic",
    *,
    out: Mapping[str, Tensor] | None = None,
    mixed_dtypes: bool = False,
    threads: int = 0,
    **knobs: Any,
) -> dict[str, Tensor]:
    """Merge fine-tuned models into one mapping name → tensor.

    `base` and `models` are checkpoints of any kind that `open_checkpoint` takes; none of them is changed. The method is
    a name or alias of `suture.methods()` and `knobs` are its own. The result has the base's names, shapes and dtypes;
    the arithmetic is float32 (float64 for float64 tensors). Tied names come back as one tensor under both names.

    `out` may give tensors to write into, such as a memory-mapped file's; then nothing of the size of a model is
    allocated. Raises `ConfigError` for an unknown method or value and `IncompatibleModels` for models that do not fit.

    >>> import torch
    >>> base, tuned = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    >>> merge(base, {"one": tuned}, "task_arithmetic", scaling_factor=0.5)
    {'w': tensor([0.5000, 0.5000])}
    """
    chosen = get_method(method)
    knobs = chosen.knobs.validate(knobs)
    frozen = knobs.get("remove_keys", ())
    vectors = open_task_vectors(base, models, frozen=frozen, mixed_dtypes=mixed_dtypes, threads=threads)
    return merge_task_vectors(vectors, chosen, knobs, out)


def merge_task_vectors(
    vectors: TaskVectors,
    method: MergeMethod,
    knobs: Mapping[str, Any],
    out: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """`merge` for models that are already open and checked, with validated knobs."""
    if out is None:
        out = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in vectors.specs.items()}
    merged = dict(out)
    if method.gather is None:
        _merge_entries(vectors, vectors.names, method, knobs, merged)
    else:
        whole_model = knobs.get("scope") == "model"
        for names in [vectors.names] if whole_model else [[name] for name in vectors.names]:
            _merge_with_statistic(vectors, names, method, knobs, merged)
    for name in vectors.kept:
        merged[name].copy_(vectors.base[name])
    return merged | {alias: merged[name] for alias, name in vectors.base.aliases.items()}


def _merge_entries(vectors, names, method, knobs, out: MutableMapping[str, Tensor]) -> None:
    def merge_piece(piece: Piece, base: Tensor, rows: Tensor) -> None:
        _refuse_non_finite(vectors, piece, rows)
        out[piece.name].view(-1)[piece.start : piece.stop] = method.function(base, rows, **knobs)

    vectors.each_piece(names, merge_piece, method.operand)


def _merge_with_statistic(vectors, names, method, knobs, out: MutableMapping[str, Tensor]) -> None:
    """Gather, merge and count votes in one pass, then merge anew the few columns that had to wait for the count."""
    statistic = method.gather(vectors.stream(names), **knobs)
    lock, votes, waiting = threading.Lock(), [0], defaultdict(list)

    def merge_piece(piece: Piece, base: Tensor, deltas: Tensor) -> None:
        _refuse_non_finite(vectors, piece, deltas)
        merged, piece_votes, cancelled = method.vote(base, deltas, statistic, **knobs)
        out[piece.name].view(-1)[piece.start : piece.stop] = merged
        columns = (
            cancelled.nonzero()[:, 0] + piece.start if statistic.majority is None and cancelled is not None else None
        )
        with lock:
            votes[0] += piece_votes
            if columns is not None:
                waiting[piece.name].append(columns)

    vectors.each_piece(names, merge_piece)
    statistic = settle(statistic, votes[0])
    for name, parts in waiting.items():
        columns = torch.cat(parts)
        base, deltas = vectors.columns(name, columns)
        out[name].view(-1)[columns] = method.function(base, deltas, statistic, **knobs).to(out[name].dtype)


def _refuse_non_finite(vectors: TaskVectors, piece: Piece, rows: Tensor) -> None:
    if rows.sum().isfinite():  # one cheap look; only a sum that overflowed or met NaN or Inf is looked at again
        return
    for label, row in zip(vectors.models, rows, strict=True):
        if not row.isfinite().all():
            found = int((~row.isfinite()).nonzero()[0]) + piece.start
            raise IncompatibleModels(
                f"'{piece.name}' is not finite at entry {found} in '{label}' or in the base. "
                "Remedy: export that checkpoint again; NaN and Inf cannot be merged."
            )
