"""The methods that have a compiled loop: each gives the bits of its own function, or None where it does not apply."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from suture.merging.compiled.slices import Slices
from suture.merging.counter_random import SlicePosition, draw_bounds, draw_key
from suture.merging.methods.ties_merging import largest_below
from suture.merging.streams import one_each

_MERGE_FUNCS = {"sum": 0, "mean": 1, "max": 2}  # as in `loops`
_FEW, _SEQUENTIAL, _COLUMNS = 4, 16, 64


class Merged(NamedTuple):
    """A merged slice in float32, the Σ of its columns' signs, and whether columns wait for the whole model's votes."""

    merged: Tensor
    votes: int = 0
    cancelled: bool = False


#: (loops, slices, statistic, position, knobs) → the merged slice; None where the plain path has to do it.
Compiled = Callable[[Any, Slices, Any, SlicePosition, dict[str, Any]], Merged | None]


def ties(loops: Any, slices: Slices, statistic: Any, position: SlicePosition, knobs: dict[str, Any]) -> Merged | None:
    """`ties_merging`, and its votes."""
    if knobs["merge_func"] == "max" and knobs["weights"] is not None:  # signs of zeros
        return None
    below = np.array([largest_below(t, np.float32) for t in statistic.thresholds.tolist()], np.float32)
    weights, weighted = _weights(knobs, len(slices.models))
    out, how, scale = (
        torch.empty(len(slices.base)),
        _MERGE_FUNCS[knobs["merge_func"]],
        np.float32(knobs["scaling_factor"]),
    )
    finite, votes, cancelled = loops.ties(*slices.arguments, below, weights, weighted, how, scale, out.numpy())
    if not finite or (cancelled and statistic.majority not in (None, 1)):
        return None
    return Merged(out, votes, cancelled) if statistic.majority is None else Merged(out)


def dare(loops: Any, slices: Slices, _: Any, position: SlicePosition, knobs: dict[str, Any]) -> Merged | None:
    """`dare`."""
    count = len(slices.models)
    if not _in_order(slices):
        return None
    divisors = np.array(one_each(knobs["density"], count, "density"), np.float32)
    keys = np.array([draw_key(knobs["seed"], model, position.tensor) for model in position.models], np.uint64)
    bounds = draw_bounds(divisors.tolist())
    out, (weights, weighted) = torch.empty(len(slices.base)), _weights(knobs, count)
    draws = (keys, position.start, np.array(bounds, np.uint32), divisors, bool(knobs["rescale"]))
    scale = np.float32(knobs["scaling_factor"])
    return Merged(out) if loops.dare(*slices.arguments, *draws, weights, weighted, scale, out.numpy()) else None


def task_arithmetic(loops: Any, slices: Slices, _: Any, position: Any, knobs: dict[str, Any]) -> Merged | None:
    """`task_arithmetic`."""
    return _linear(loops, slices, knobs, True, knobs["scaling_factor"], False)


def simple_average(loops: Any, slices: Slices, _: Any, position: Any, knobs: dict[str, Any]) -> Merged | None:
    """`simple_average`."""
    weights = knobs["weights"]
    total = len(slices.models) if weights is None else sum(weights)
    return _linear(loops, slices, knobs, False, total, knobs["normalize"] and abs(total) >= 1e-8)


def _linear(
    loops: Any, slices: Slices, knobs: dict[str, Any], deltas: bool, factor: float, divide: bool
) -> Merged | None:
    count = len(slices.models)
    if not _in_order(slices):
        return None
    out, (weights, weighted) = torch.empty(len(slices.base)), _weights(knobs, count)
    options = (deltas, weights, weighted, np.float32(factor), divide)
    return Merged(out) if loops.linear(*slices.arguments, *options, out.numpy()) else None


def _in_order(slices: Slices) -> bool:
    """Whether torch adds the rows of a slice one after another, as the loops do.

    It does so for few rows, and for fewer than 16 in the columns that fill its vectors.
    """
    count = len(slices.models)
    return count <= _FEW or (count < _SEQUENTIAL and len(slices.base) % _COLUMNS == 0)


def _weights(knobs: dict[str, Any], count: int) -> tuple[np.ndarray, bool]:
    weights: Sequence[float] | None = knobs["weights"]
    values = [1.0] * count if weights is None else one_each(weights, count, "weights")
    return np.array(values, np.float32), weights is not None


COMPILED: dict[str, Compiled] = {
    "ties_merging": ties,
    "dare": dare,
    "task_arithmetic": task_arithmetic,
    "simple_average": simple_average,
}
