"""TIES-Merging: trim, elect sign, disjoint merge. https://arxiv.org/abs/2306.01708

Trim needs one number per task, the magnitude that the kept entries reach. With scope `model` (the authors) it is taken
over the whole model, so it is gathered from the stream of task vectors before anything is merged; with scope `tensor`
(as mergekit does) over one tensor. Everything after that works entry by entry.
"""

from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from annotated_types import Gt, Le
from jaxtyping import Float
from torch import Tensor

from suture.merging.order_statistic import kth_magnitudes
from suture.merging.registry import merge_method
from suture.merging.streams import DeltaStream, OneTensor, one_each

THRESHOLD = 20.0  #: the percentage of entries that the authors keep
Threshold = Annotated[float, Gt(0), Le(100)]
_EXACT = 1 << 24  # up to here float32 counts without error


class TiesStatistic(NamedTuple):
    """What TIES must know of the whole before it can merge a part.

    `thresholds`: (task,) magnitude at which an entry survives the trim. `majority`: the sign, +1, −1 or 0, given to
    columns whose survivors cancel exactly; None while the votes are still being counted.
    """

    thresholds: Float[Tensor, " task"]
    majority: int | None


def trim_thresholds(
    deltas: DeltaStream, *, threshold: float | Sequence[float] = THRESHOLD, scope: str = "model", **_
) -> TiesStatistic:
    """The k-th largest magnitude of every task vector, exact, from one pass over the stream.

    With d entries and a kept fraction K, the authors keep `|τ| ≥` the (d − int(dK))-th smallest magnitude; mergekit
    keeps max(1, int(dK)) entries of each tensor. Memory is a few MB whatever the size of the model.
    """
    rank = lambda told: _rank(deltas.num_entries, told / 100 if told > 1 else told, scope)
    ranks = rank(threshold) if isinstance(threshold, int | float) else list(map(rank, threshold))
    return TiesStatistic(kth_magnitudes(deltas, ranks), None if scope == "model" else 1)


def _rank(num_entries: int, fraction: float, scope: str) -> int:
    kept = int(num_entries * fraction)  # in floats, as the authors and mergekit have it: 28 of 100 for 0.29
    return num_entries - kept if scope == "model" else num_entries - max(1, kept) + 1


def _merge_and_vote(base, deltas, statistic, *, merge_func="sum", scaling_factor=0.3, weights=None, **_):
    """Like `ties_merging`, and beside it (votes, cancelled): Σ of column signs, and which columns wait for it.

    While the votes are being counted cancelled columns are merged as positive.
    """
    trimmed = [_trim(row, t) for row, t in zip(deltas, statistic.thresholds.tolist(), strict=True)]
    if weights is not None:
        trimmed = [row * weight for row, weight in zip(trimmed, weights, strict=True)]
    column_sum = trimmed[0].clone()
    for row in trimmed[1:]:
        column_sum += row
    side = torch.copysign(torch.ones(()), column_sum)
    merged = _disjoint_merge(trimmed, side, merge_func, weights)
    votes, cancelled = 0, None
    if statistic.majority != 1:
        cancelled = _cancelled(column_sum, merged)
        signs = column_sum.sign_()
        votes = int(signs.sum() if signs.numel() <= _EXACT else signs.sum(dtype=torch.float64))
        if statistic.majority is not None and cancelled is not None:
            side[cancelled] = -1.0
            merged = _disjoint_merge(trimmed, side, merge_func, weights)
            if statistic.majority == 0 and merge_func == "max":
                merged[cancelled] = 0
    return merged.mul_(scaling_factor).add_(base), votes, cancelled


def _disjoint_merge(trimmed: list[Tensor], side: Tensor, merge_func: str, weights: Sequence[float] | None) -> Tensor:
    """Sum, mean or largest of the entries of each column that are on its side, which is +1 or −1 for every column."""
    merged, agreeing = torch.zeros_like(side), torch.empty_like(side)
    mass = torch.zeros_like(side) if merge_func == "mean" else None
    for row, weight in zip(trimmed, weights or [1.0] * len(trimmed), strict=True):
        torch.mul(row, side, out=agreeing).clamp_min_(0)  # products are several times faster than masks
        if merge_func == "max":
            torch.maximum(merged, agreeing, out=merged)
        else:
            merged += agreeing
        if mass is not None:
            mass.add_(torch.gt(agreeing, 0, out=agreeing), alpha=weight)
    merged *= side
    if mass is None:
        return merged
    return merged.div_(mass.clamp_min_(1) if weights is None else torch.where(mass.abs() < 1e-8, 1.0, mass))


@merge_method(paper="https://arxiv.org/abs/2306.01708", gather=trim_thresholds, vote=_merge_and_vote, searches=True)
def ties_merging(
    base: Float[Tensor, " *shape"],
    deltas: Float[Tensor, " task *shape"],
    statistic: TiesStatistic | None = None,
    *,
    scaling_factor: float = 0.3,
    threshold: Threshold | Sequence[Threshold] = THRESHOLD,
    remove_keys: Sequence[str] = (),
    merge_func: Literal["sum", "mean", "max"] = "sum",
    scope: Literal["model", "tensor"] = "model",
    weights: Sequence[float] | None = None,
) -> Float[Tensor, " *shape"]:
    """Trim each task vector to its largest entries, elect a sign per column, merge the entries that agree with it.

    `threshold` above 1 is a percentage, else a fraction; it may be one for each model. `scope=model` trims over the
    whole model, with the authors' count; `scope=tensor` per tensor, with mergekit's count, its `+` for cancelled
    columns, and `mean` as Σwδ/Σw.
    `weights`: (task,) multiply the task vectors after the trim. `remove_keys` stay at the base.

    Without a `statistic` the tensor given is taken as the whole model.

    >>> base, deltas = torch.zeros(3), torch.tensor([[4.0, 1.0, -3.0], [2.0, -5.0, -1.0]])
    >>> ties_merging(base, deltas, threshold=60, scaling_factor=1.0)
    tensor([ 6., -5., -3.])
    """
    if weights is not None:
        one_each(weights, len(deltas), "weights")
    knobs = {"merge_func": merge_func, "scaling_factor": scaling_factor, "weights": weights}
    if statistic is None:
        statistic = trim_thresholds(OneTensor(deltas), threshold=threshold, scope=scope)
    if statistic.majority is None:
        _, votes, _ = _merge_and_vote(base, deltas, statistic, **knobs)
        statistic = settle(statistic, votes)
    return _merge_and_vote(base, deltas, statistic, **knobs)[0]


def settle(statistic: TiesStatistic, votes: int) -> TiesStatistic:
    """The statistic with the majority sign that the votes of the whole model give."""
    return statistic._replace(majority=int(np.sign(votes)))


def as_merged(statistic: TiesStatistic) -> bool:
    """Whether cancelled columns come out as they did while the votes were being counted: on the positive side."""
    return statistic.majority == 1


def ties_rows(deltas: Float[Tensor, " task *shape"], statistic: TiesStatistic) -> Float[Tensor, " task *shape"]:
    """The task vectors of AdaMerging++: each task's trimmed entries that agree with the elected sign.

    Their sum over tasks is the TIES merged vector with `merge_func=sum`. The statistic must be settled.
    """
    trimmed = torch.stack([_trim(row, t) for row, t in zip(deltas, statistic.thresholds.tolist(), strict=True)])
    side = trimmed.sum(0).sign_()
    side = torch.where(side == 0, float(statistic.majority or -1), side)
    return trimmed * (trimmed * side > 0)


def _trim(row: Tensor, threshold: float) -> Tensor:
    """Zero the entries whose magnitude is below the threshold, a float64, without rounding either.

    `hardshrink` keeps |x| > λ, so λ is the largest number of the row's dtype that is below the threshold.
    """
    if threshold == 0:
        return row
    dtype = np.float64 if row.dtype == torch.float64 else np.float32
    with np.errstate(over="ignore"):  # beyond float32 nothing of a float32 row survives
        below = dtype(threshold)
    if float(below) >= threshold:
        below = np.nextafter(below, dtype(0))
    return torch.nn.functional.hardshrink(row, float(below))


def _cancelled(column_sum: Tensor, merged: Tensor) -> Tensor | None:
    """Which columns have survivors that sum to exactly 0; None if there is no such column.

    `merged` has the columns that sum to 0 on the positive side, where each of them has a survivor.
    """
    survivors = torch.eq(column_sum, 0, out=torch.empty_like(merged)).mul_(merged)
    return survivors > 0 if survivors.sum() > 0 else None
