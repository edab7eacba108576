"""The distribution of one step's inputs over passes through the network and over processes.

If an input's output does not depend on other inputs, a batch can be cut anywhere: each piece is weighted by its share
of the task's mean, so the sum over pieces, passes and processes is exactly the objective.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from suture.core.batches import joinable, size, take

Pass = list["Part"]


class Part(NamedTuple):
    """Inputs of one task, their share of its mean, and the expert's output for them, if the objective needs it."""

    task: str
    inputs: Any
    share: float = 1.0
    target: Tensor | None = None


def passes(
    inputs: Mapping[str, Any],
    *,
    concatenate: bool,
    independent: bool = True,
    micro_batch: int | None = None,
    rank: int = 0,
    world: int = 1,
) -> list[Pass]:
    """The passes of process `rank` of `world` in one step.

    `independent` inputs are distributed over processes one by one and cut into passes of at most `micro_batch`; other
    inputs are only distributed by whole tasks. With `concatenate` tasks share passes.

    >>> import torch
    >>> [[part.share for part in p] for p in passes({"t": torch.ones(3)}, concatenate=True, micro_batch=2)]
    [[0.6666666666666666], [0.3333333333333333]]
    """
    if not independent:
        mine = list(inputs.items())[rank::world]
        return [[Part(task, batch)] for task, batch in mine]
    parts = [part for task, batch in inputs.items() for part in _cut(task, batch, micro_batch, rank, world)]
    return _packed(parts, micro_batch) if concatenate else [[part] for part in parts]


def even_passes(inputs: Mapping[str, Any], *, rank: int, world: int, **cut: Any) -> list[Pass]:
    """`passes`, as many in every process: where there are fewer, one input is passed again, with a share of 0."""
    each = [passes(inputs, rank=number, world=world, **cut) for number in range(world)]
    task, batch = next(iter(inputs.items()))
    idle = [Part(task, take(batch, slice(0, 1)) if cut["independent"] else batch, 0.0)]
    return each[rank] + [idle] * (max(map(len, each)) - len(each[rank]))


def _cut(task: str, batch: Any, micro_batch: int | None, rank: int, world: int) -> list[Part]:
    if world == 1 and micro_batch is None:
        return [Part(task, batch)]
    mine = take(batch, slice(rank, None, world))
    step = micro_batch or max(1, size(mine))
    pieces = [take(mine, slice(at, at + step)) for at in range(0, size(mine), step)]
    return [Part(task, piece, size(piece) / size(batch)) for piece in pieces]


def _packed(parts: Sequence[Part], limit: int | None) -> list[Pass]:
    """Passes of neighbouring parts that can be concatenated, with at most `limit` inputs each."""
    packed: list[Pass] = []
    for part in parts:
        last = packed[-1] if packed else []
        full = limit is not None and sum(size(p.inputs) for p in last) + size(part.inputs) > limit
        if last and not full and joinable(last[0].inputs, part.inputs):
            last.append(part)
        else:
            packed.append([part])
    return packed
