"""Merging a whole model with one method, into tensors that are allocated first."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from suture.checkpoints import Source
from suture.merging.overflow import refuse_overflow
from suture.merging.registry import MergeMethod, get_method
from suture.merging.selection import Selection
from suture.merging.task_vectors import Piece, TaskVectors, open_task_vectors
from suture.merging.tensorwise import Merging
from suture.merging.wrapping import After, Wrapped, Wrapping, chosen_wrappers


def merge(
    base: Source,
    models: Mapping[str, Source] | Sequence[Source],
    method: str = "task_arithmetic",
    *,
    out: Mapping[str, Tensor] | None = None,
    mixed_dtypes: bool = False,
    threads: int = 0,
    device: str = "cpu",
    after: After = None,
    frozen: Sequence[str] = (),
    keep: Sequence[str] = (),
    only: Sequence[str] = (),
    key: str | None = None,
    **knobs: Any,
) -> dict[str, Tensor]:
    """Merge fine-tuned models into one mapping name → tensor.

    `base` and `models` are any checkpoints that `open_checkpoint` takes; none of them is changed. `method` is a name or
    alias from `suture.methods()`, and `knobs` are that method's. The result has the base's names, shapes and dtypes;
    arithmetic is in float32 (float64 for float64 tensors). Tied names share one tensor. `after` names wrappers that
    change the update before it is added to the base, in their order: `["svc", "lines"]`, or with their knobs
    `{"svc": {"alpha": 0.2}}`.

    Names or patterns choose tensors: those of `frozen` and `keep` stay at the base, whatever the models have there or
    lack; with `only`, all others do. `key` chooses one of several models in a PyTorch file, such as params_ema.

    Slices are merged on `device`, cpu, cuda or cuda:N, whatever the method; order statistics such as TIES's thresholds
    are searched for there too, other statistics on the CPU. The result is on the CPU. `out` may hold tensors to write
    into, such as those of a memory-mapped file; then nothing of the size of a model is allocated.

    Raises `ConfigError` for an unknown method or value, and `IncompatibleModels` for models that do not fit together,
    weights that are not finite, and results that are too large for their dtype.

    >>> import torch
    >>> base, tuned = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    >>> merge(base, {"one": tuned}, "task_arithmetic", scaling_factor=0.5)
    {'w': tensor([0.5000, 0.5000])}
    """
    chosen, wrapped = get_method(method), chosen_wrappers(after)
    knobs = chosen.knobs.validate(knobs)
    choice = {"selection": Selection(frozen, keep, only), "key": key, "device": device}
    left_out = knobs.get("remove_keys", ())
    vectors = open_task_vectors(base, models, frozen=left_out, mixed_dtypes=mixed_dtypes, threads=threads, **choice)
    return merge_task_vectors(vectors, chosen, knobs, out, wrapped)


def merge_task_vectors(
    vectors: TaskVectors,
    method: MergeMethod,
    knobs: Mapping[str, Any],
    out: Mapping[str, Tensor] | None = None,
    after: Sequence[Wrapped] = (),
) -> dict[str, Tensor]:
    """As `merge`, for models that are open and checked, with validated knobs."""
    if out is None:
        out = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in vectors.specs.items()}
    merged = dict(out)

    def write(piece: Piece, part: Tensor) -> None:
        stored = part.to(merged[piece.name].dtype)
        refuse_overflow(piece.name, part, stored, start=piece.start)
        merged[piece.name].view(-1)[piece.start : piece.stop] = stored.cpu()

    merging = Merging(vectors, method, lambda name: knobs, write)
    (Wrapping(merging, after, write) if after else merging).run()
    for name in vectors.unchanged:
        merged[name].copy_(vectors.base[name])
    return merged | {alias: merged[name] for alias, name in vectors.base.aliases.items()}
