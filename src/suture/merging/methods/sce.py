"""SCE: select, calculate, erase. https://arxiv.org/abs/2408.07990"""

from typing import Annotated, NamedTuple

import torch
from annotated_types import Ge, Le
from jaxtyping import Float
from torch import Tensor

from suture.merging.order_statistic import kth_magnitudes, share_of
from suture.merging.registry import merge_method
from suture.merging.streams import DeltaStream, Derived, OneTensor, total


class SceStatistic(NamedTuple):
    """`threshold`: the variance over tasks at which an entry is selected; `weights`: (task,) each task's share."""

    threshold: float
    weights: Float[Tensor, " task"]


def sce_statistic(deltas: DeltaStream, *, select_topk: float = 1.0) -> SceStatistic:
    """The variance that selected entries reach, and each task's share of the sum of their squares."""
    threshold = _variance_threshold(deltas, select_topk)

    def squares_of(_, rows: Tensor) -> Tensor:
        return _select(rows, threshold).to(torch.float64, copy=True).square_().sum(1)

    squares = total(deltas, squares_of) / deltas.num_entries
    if squares.sum().abs() < 1e-6:  # from the published code; the paper does not mention this case
        return SceStatistic(threshold, torch.full_like(squares, 1 / len(squares)))
    return SceStatistic(threshold, squares / squares.sum())


def _variance_threshold(deltas: DeltaStream, select_topk: float) -> float:
    if select_topk >= 1:
        return 0.0
    variances = Derived(deltas, lambda rows: _variance(rows)[None])
    selected = share_of(int(total(variances, lambda base, row: row.count_nonzero())), select_topk)
    return float(kth_magnitudes(variances, variances.num_entries - selected + 1)) if selected else float("inf")


def _passes(*, select_topk: float) -> int:
    """Two more passes where only some entries are selected: one counts those that vary, one finds the threshold."""
    return 2 if select_topk >= 1 else 4


@merge_method(
    paper="https://arxiv.org/abs/2408.07990",
    gather=sce_statistic,
    num_models=(2, float("inf")),
    searches=1,
    passes=_passes,
)
def sce(
    base: Float[Tensor, " *shape"],
    deltas: Float[Tensor, " task *shape"],
    statistic: SceStatistic | None = None,
    *,
    select_topk: Annotated[float, Ge(0), Le(1)] = 1.0,
) -> Float[Tensor, " *shape"]:
    """Select the entries that vary most over tasks, weigh tasks by their squares, erase entries of the minority sign.

    `select_topk` is the share that is selected of a tensor's entries that vary at all. Columns whose selected entries
    cancel count as positive. Without a `statistic` it is computed from the tensors given.

    >>> sce(torch.zeros(2), torch.tensor([[3.0, 0.0], [1.0, -1.0]]))
    tensor([ 2.6364, -1.0000])
    """
    if statistic is None:
        statistic = sce_statistic(OneTensor(deltas), select_topk=select_topk)
    selected = _select(deltas, statistic.threshold)
    side = torch.where(selected.sum(0) >= 0, 1.0, -1.0)
    merged, mass = torch.zeros_like(base), torch.zeros_like(base)
    for row, weight in zip(selected, statistic.weights.to(base.dtype), strict=True):
        share = weight * (row.sign() == side)
        merged += share * row
        mass += share
    return base + merged / mass.clamp_min(1e-6)


def _select(deltas: Tensor, threshold: float) -> Tensor:
    return deltas if threshold == 0 else deltas * (_variance(deltas) >= threshold)


def _variance(deltas: Tensor) -> Tensor:
    return deltas.var(0, correction=0)
