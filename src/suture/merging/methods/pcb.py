"""PCB-Merging: balance of the parameters' competition, within and between tasks. https://arxiv.org/abs/2410.02396

An entry's weight grows with its magnitude within the task (intra-balancing) and with its agreement with the others
(inter-balancing). Both, and the drop of the least, need order statistics of each task: of its magnitudes, and of the
balance itself, which are found without sorting it.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated, Literal, NamedTuple

import torch
from annotated_types import Ge, Gt, Le, Lt
from jaxtyping import Float
from torch import Tensor

from suture.merging.order_statistic import order_statistics
from suture.merging.registry import merge_method
from suture.merging.streams import DeltaStream, Derived, OneTensor


class PcbStatistic(NamedTuple):
    """(task,) the magnitudes at which entries are clipped, and the balance that gets the weights 0 and 1."""

    low: Float[Tensor, " task"]
    high: Float[Tensor, " task"]
    floor: Float[Tensor, " task"]
    ceiling: Float[Tensor, " task"]


Inter = Literal["value", "pairs", "sum"]


def pcb_statistic(
    deltas: DeltaStream, *, density: float = 0.05, clip: float = 0.01, inter: Inter = "value", **_
) -> PcbStatistic:
    """The order statistics of each task's magnitudes, and of its balance, with the ranks of the published code."""
    count = deltas.num_entries
    ends = (int(count * clip), max(0, int((1 - clip) * count - 1)))
    low, high = order_statistics(deltas, [rank + 1 for rank in ends])
    middle = min(count - 1, int(count * (1 - density)))
    balance = partial(_balances, low=low.tolist(), high=high.tolist(), inter=inter)
    floor, ceiling = _signed_statistics(deltas, balance, [middle + 1, count])
    return PcbStatistic(low, high, floor, ceiling)


def _signed_statistics(
    deltas: DeltaStream, function: Callable[[Tensor], Tensor], ranks: list[int]
) -> Float[Tensor, "rank task"]:
    """Order statistics of numbers of both signs, from those of the magnitudes of either side."""
    found = order_statistics(Derived(deltas, lambda rows: function(rows).clamp_min_(0)), ranks)
    if found.all():
        return found
    mirrored = [deltas.num_entries - rank + 1 for rank in ranks]
    return found - order_statistics(Derived(deltas, lambda rows: function(rows).neg_().clamp_min_(0)), mirrored)


@merge_method(paper="https://arxiv.org/abs/2410.02396", gather=pcb_statistic, searches=2, passes=lambda **knobs: 4)
def pcb(
    base: Float[Tensor, " *shape"],
    deltas: Float[Tensor, " task *shape"],
    statistic: PcbStatistic | None = None,
    *,
    scaling_factor: float = 1.2,
    density: Annotated[float, Gt(0), Le(1)] = 0.05,
    clip: Annotated[float, Ge(0), Lt(0.5)] = 0.01,
    inter: Inter = "value",
    scope: Literal["model", "tensor"] = "model",
) -> Float[Tensor, " *shape"]:
    """Average the task vectors entry by entry, with weights from the competition within and between tasks.

    Magnitudes are clipped at both ends, by a share `clip` of each task's entries, to a_t, and scaled to [0, 1], n_t,
    g_t = sign(τ_t) n_t. The balance of an entry is exp(T n_t²) times its agreement with the other tasks, which is
    `inter`: "value" tanh(τ_t Σ_s g_s), "pairs" Σ_s tanh(g_t g_s), or "sum" tanh(τ_t Σ_s τ_s). These are the three forms
    of the authors' repository; the last goes there with `clip=0.0001` and `density=0.1`. The weights are the balance,
    scaled to [0, 1] over the largest share `density` of each task's entries, and 0 below. The shares are those of the
    whole model with `scope=model`, and of each tensor with `scope=tensor`. Without a `statistic` (these ends) it is
    computed from the tensors given.

    >>> deltas = torch.tensor([[1.0, 2.0, -4.0, 0.0], [1.0, -2.0, -3.0, 0.0]])
    >>> pcb(torch.zeros(4), deltas, density=0.5, clip=0.0, scaling_factor=1.0)
    tensor([ 0.0000,  0.0000, -3.5000,  0.0000])
    """
    if statistic is None:
        statistic = pcb_statistic(OneTensor(deltas), density=density, clip=clip, inter=inter)
    low, high, floors, ceilings = (values.tolist() for values in statistic)
    balances = _balances(deltas, low, high, inter)
    merged, mass = torch.zeros_like(base), torch.zeros_like(base)
    for row, balance, least, most, floor, ceiling in zip(deltas, balances, low, high, floors, ceilings, strict=True):
        weight = _scaled(balance, floor, ceiling)
        merged += row.abs().clamp_(least, most).mul_(row.sign()).mul_(weight)
        mass += weight
    return base + scaling_factor * merged / mass.clamp_min_(1e-12)


def _balances(deltas: Tensor, low: list[float], high: list[float], inter: Inter) -> Float[Tensor, " task *shape"]:
    """exp(T (n_t² − 1)) times the agreement: e^T smaller than published, which no weight depends on."""
    own = torch.stack([_scaled(row.abs(), *ends) for row, *ends in zip(deltas, low, high, strict=True)])
    balances = torch.empty_like(deltas)
    for out, agreement, n in zip(balances, _agreements(deltas, own, inter), own, strict=True):
        torch.mul(agreement, n.square().sub_(1).mul_(len(deltas)).exp_(), out=out)
    return balances


def _agreements(deltas: Tensor, own: Tensor, inter: Inter) -> Iterator[Tensor]:
    """Each task's agreement with all, task by task. `own`: n_t."""
    if inter == "sum":
        total = deltas.sum(0)
        yield from (torch.tanh(row * total) for row in deltas)
        return
    signed = deltas.sign().mul_(own)
    if inter == "value":
        total = signed.sum(0)
        yield from (torch.tanh(row * total) for row in deltas)
        return
    for row in signed:
        yield sum((torch.tanh(row * other) for other in signed), torch.zeros_like(row))


def _scaled(row: Tensor, low: float, high: float) -> Tensor:
    """The row, clipped to [low, high] and scaled to [0, 1]; 0 where these are equal."""
    return row.clamp(low, high).sub_(low).div_(high - low) if high > low else torch.zeros_like(row)
