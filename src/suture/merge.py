"""Run one method over a whole model: slice by slice, in bounded memory, into tensors that are already allocated."""

import threading
from collections import defaultdict
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from suture.checkpoints import Source
from suture.errors import ConfigError, IncompatibleModels
from suture.methods import MergeMethod, Place, get_method, settle
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
    if problem := method.check_number(len(vectors.models)):
        raise ConfigError(problem)
    if method.gather is None:
        _merge_entries(vectors, vectors.names, method, knobs, merged)
    else:
        whole_model = knobs.get("scope") == "model"
        merge_group = _merge_with_statistic if method.vote is None else _merge_with_votes
        one_by_one = ([name] for name in vectors.names if vectors.specs[name].numel)
        for names in [vectors.names] if whole_model else one_by_one:
            merge_group(vectors, names, method, knobs, merged)
    for name in vectors.kept:
        merged[name].copy_(vectors.base[name])
    return merged | {alias: merged[name] for alias, name in vectors.base.aliases.items()}


def _merge_entries(vectors, names, method, knobs, out: MutableMapping[str, Tensor], *statistic: Any) -> None:
    labels = list(vectors.models)

    def merge_piece(piece: Piece, base: Tensor, rows: Tensor) -> None:
        _refuse_non_finite(vectors, piece, base, rows)
        place = {"place": Place(piece.name, labels, piece.start)} if method.wants_place else {}
        if method.whole_rows:
            width = vectors.row_width(piece.name)
            base, rows = base.view(-1, width), rows.view(len(rows), -1, width)
        merged = method.function(base, rows, *statistic, **place, **knobs)
        out[piece.name].view(-1)[piece.start : piece.stop] = merged.reshape(-1)

    vectors.each_piece(names, merge_piece, method.operand, whole_rows=method.whole_rows)


def _merge_with_statistic(vectors, names, method, knobs, out: MutableMapping[str, Tensor]) -> None:
    _merge_entries(vectors, names, method, knobs, out, method.gather(vectors.stream(names, method.operand), **knobs))


def _merge_with_votes(vectors, names, method, knobs, out: MutableMapping[str, Tensor]) -> None:
    """Gather, merge and count votes in one pass, then merge anew the few columns that had to wait for the count."""
    statistic = method.gather(vectors.stream(names), **knobs)
    lock, votes, waiting = threading.Lock(), [0], defaultdict(list)

    def merge_piece(piece: Piece, base: Tensor, deltas: Tensor) -> None:
        _refuse_non_finite(vectors, piece, base, deltas)
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


def _refuse_non_finite(vectors: TaskVectors, piece: Piece, base: Tensor, rows: Tensor) -> None:
    if (rows.sum() + base.sum()).isfinite():  # one cheap look; only a sum that overflowed or met NaN or Inf goes on
        return
    for label, row in [*zip(vectors.models, rows, strict=True), ("_pretrained_", base)]:
        if not row.isfinite().all():
            found = int((~row.isfinite()).nonzero()[0]) + piece.start
            raise IncompatibleModels(
                f"'{piece.name}' is not finite at entry {found} in '{label}' or in the base. "
                "Remedy: export that checkpoint again; NaN and Inf cannot be merged."
            )
