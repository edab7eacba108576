"""TIES-Merging: trim, elect sign, disjoint merge. https://arxiv.org/abs/2306.01708

The trim needs one number per task: the smallest magnitude that survives. With scope `model` (the authors) it is taken
over the whole model, so it is gathered from the stream of task vectors before anything is merged; with scope `tensor`
(mergekit) over each tensor. Everything after that works entry by entry.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import numpy as np
import torch
from annotated_types import Gt, Le
from jaxtyping import Float
from torch import Tensor

from suture.merging.order_statistic import kth_magnitudes
from suture.merging.registry import get_method, merge_method
from suture.merging.streams import DeltaStream, OneTensor, one_each

if TYPE_CHECKING:
    from suture.merging.task_vectors import Piece, TaskVectors

THRESHOLD = 20.0  #: the percentage of entries that the authors keep
Threshold = Annotated[float, Gt(0), Le(100)]
_EXACT = 1 << 24  # up to here float32 counts without error


class TiesStatistic(NamedTuple):
    """The numbers of the whole model that TIES needs before it can merge a part.

    `thresholds`: (task,) the smallest magnitude that survives the trim. `majority`: the sign, +1, −1 or 0, given to
    columns whose survivors cancel exactly; None while the votes are being counted.
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
    single = isinstance(threshold, int | float)
    ranks = [_rank(deltas.num_entries, each, scope) for each in ([threshold] if single else threshold)]
    return TiesStatistic(kth_magnitudes(deltas, ranks[0] if single else ranks), None if scope == "model" else 1)


def _rank(num_entries: int, threshold: float, scope: str) -> int:
    fraction = threshold / 100 if threshold > 1 else threshold
    survivors = int(num_entries * fraction)  # in floats, as the authors and mergekit compute it: 28 of 100 for 0.29
    return num_entries - survivors if scope == "model" else num_entries - max(1, survivors) + 1


def _merge_and_vote(base, deltas, statistic, *, merge_func="sum", scaling_factor=0.3, weights=None, **_):
    """As `ties_merging`, and (votes, cancelled): Σ of the column signs, and a mask of the columns that wait for it.

    While the votes are being counted, cancelled columns are merged as positive.
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
    """Sum, mean or largest of the entries of each column whose sign is the column's `side`, +1 or −1."""
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


@merge_method(
    paper="https://arxiv.org/abs/2306.01708",
    gather=trim_thresholds,
    vote=_merge_and_vote,
    searches=1,
    scale="scaling_factor",
)
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

    `threshold` above 1 is a percentage, else a fraction; it may be one value per model. `scope=model` trims over the
    whole model and counts entries as the authors do; `scope=tensor` trims each tensor and follows mergekit: its count,
    positive cancelled columns, and Σwδ/Σw for `mean`. `weights`: (task,) multiply the task vectors after the trim.
    Tensors named in `remove_keys` stay at the base. Without a `statistic` it is computed from the tensors given, as if
    they were the whole model.

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
    """The statistic with the majority sign of the whole model's votes."""
    return statistic._replace(majority=int(np.sign(votes)))


def settled_statistic(vectors: "TaskVectors", threshold: float = THRESHOLD) -> TiesStatistic:
    """TIES's statistic of a whole model: the trim's thresholds, and the majority sign from one more pass."""
    votes: list[int] = []
    knobs = get_method("ties_merging").knobs.validate({"threshold": threshold})
    statistic = trim_thresholds(vectors.stream(), **knobs)

    def count(piece: "Piece", base: Tensor, deltas: Tensor) -> None:
        votes.append(_merge_and_vote(base, deltas, statistic)[1])

    vectors.each_piece(vectors.names, count)
    return settle(statistic, sum(votes))


def as_merged(statistic: TiesStatistic) -> bool:
    """Whether cancelled columns are positive, as they were merged while the votes were being counted."""
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
    """Zero the entries whose magnitude is below the float64 threshold, without rounding the entries or the threshold.

    `hardshrink` keeps |x| > λ, so λ is the largest number of the row's dtype below the threshold.
    """
    if threshold == 0:
        return row
    dtype = np.float64 if row.dtype == torch.float64 else np.float32
    return torch.nn.functional.hardshrink(row, largest_below(threshold, dtype))


def largest_below(threshold: float, dtype: type[np.floating]) -> float:
    """The largest number of a dtype below a threshold; −1 for 0, which trims nothing."""
    if threshold == 0:
        return -1.0
    with np.errstate(over="ignore"):  # a threshold beyond float32 becomes Inf, and no entry of a float32 row survives
        below = dtype(threshold)
    return float(np.nextafter(below, dtype(0)) if float(below) >= threshold else below)


def _cancelled(column_sum: Tensor, merged: Tensor) -> Tensor | None:
    """Mask of the columns whose survivors sum to exactly 0; None if there is no such column.

    In `merged` the columns that sum to 0 are on the positive side, so each with survivors is above 0 there.
    """
    survivors = torch.eq(column_sum, 0, out=torch.empty_like(merged)).mul_(merged)
    return survivors > 0 if survivors.max() > 0 else None
