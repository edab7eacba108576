"""Prepare once, apply often: the update of a merge on its own, and the base with a multiple of it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from suture.checkpoints import Checkpoint, Source, TensorSpec, open_checkpoint
from suture.errors import ConfigError
from suture.merging.overflow import refuse_overflow
from suture.merging.registry import MergeMethod, get_method
from suture.merging.task_vectors import Piece, TaskVectors, compute_dtype, open_task_vectors
from suture.merging.tensorwise import Merging

_SLICE = 1 << 20  # entries


def prepare(
    base: Source,
    models: Mapping[str, Source] | Sequence[Source],
    method: str,
    *,
    out: Mapping[str, Tensor] | None = None,
    mixed_dtypes: bool = False,
    threads: int = 0,
    **knobs: Any,
) -> dict[str, Tensor]:
    """The update M of every merged tensor, for methods whose result is base + scale · M: name → tensor.

    Arguments are those of `merge`, without the knob that is the scale (`method.scale`). Updates are float32, float64
    for float64 tensors. `out` may hold tensors to write into: see `update_specs`. Raises `ConfigError` for a method
    that has no such knob.

    >>> base, tuned = {"w": torch.ones(2)}, {"w": torch.tensor([2.0, 1.0])}
    >>> update = prepare(base, [tuned], "task_arithmetic")
    >>> apply(base, update, 0.5)
    {'w': tensor([1.5000, 1.0000])}
    """
    chosen = get_method(method)
    if chosen.scale in knobs:
        raise ConfigError(f"method.{chosen.scale} is what a prepared merge leaves open. Remedy: give it to apply.")
    knobs = chosen.knobs.validate(knobs)
    frozen = knobs.get("remove_keys", ())
    vectors = open_task_vectors(base, models, frozen=frozen, mixed_dtypes=mixed_dtypes, threads=threads)
    return prepare_task_vectors(vectors, chosen, knobs, out)


def prepare_task_vectors(
    vectors: TaskVectors, method: MergeMethod, knobs: Mapping[str, Any], out: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """As `prepare`, for models that are open and checked, with validated knobs."""
    if method.scale is None:
        raise ConfigError(f"{method.name} has no factor of its whole update. Remedy: merge once for every value.")
    if out is None:
        out = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in update_specs(vectors).items()}
    update, fixed = dict(out), {**knobs, method.scale: 1.0}

    def write(piece: Piece, part: Tensor) -> None:
        update[piece.name].view(-1)[piece.start : piece.stop] = part

    Merging(vectors, method, lambda name: fixed, write, update=True).run()
    return update


def update_specs(vectors: TaskVectors) -> dict[str, TensorSpec]:
    """Name → shape and dtype of every update, as `allocate_checkpoint` takes them for a file."""
    specs = {name: vectors.base.specs[name] for name in vectors.names}
    return {name: spec._replace(dtype=compute_dtype(spec.dtype)) for name, spec in specs.items()}


def apply(
    base: Source,
    update: Mapping[str, Tensor],
    scale: float | Mapping[str, float],
    *,
    out: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The base plus `scale` times a prepared update, with the bits of a merge at that scale: name → tensor.

    `scale` may be one number for each name in the update. Other tensors are the base's. The result has the base's names
    and dtypes, and tied names share one tensor; `out` may hold tensors to write into. Raises `ConfigError` for a scale
    that is missing or not finite, and `IncompatibleModels` for results too large for their dtype.
    """
    base = open_checkpoint(base)
    scales = scale if isinstance(scale, Mapping) else dict.fromkeys(update, scale)
    for name in update:
        if not math.isfinite(scales.get(name, math.nan)):
            raise ConfigError(f"The scale of '{name}' is {scales.get(name)}. Remedy: give a number for each tensor.")
    names = [name for name in base.specs if name not in base.aliases]
    if out is None:
        out = {name: torch.empty(base.specs[name].shape, dtype=base.specs[name].dtype) for name in names}
    merged = {name: out[name] for name in sorted(names)}
    for name, tensor in merged.items():
        if name in update:
            _add(base, name, update[name], scales[name], tensor)
        else:
            tensor.copy_(base[name])
    return merged | {alias: merged[name] for alias, name in base.aliases.items()}


def _add(base: Checkpoint, name: str, update: Tensor, scale: float, out: Tensor) -> None:
    flat, changes, target = base.flat(name), update.reshape(-1), out.view(-1)
    for start in range(0, len(changes), _SLICE):
        piece = slice(start, start + _SLICE)
        merged = flat[piece].to(update.dtype) + scale * changes[piece]
        stored = merged.to(out.dtype)
        refuse_overflow(name, merged, stored, start=start)
        target[piece] = stored
