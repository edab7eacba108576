"""Constant tensors of all tasks on an accelerator, where they fit, and the positions of many steps' batches in them."""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from suture.core.batches import nbytes, sent, size, take
from suture.core.machine import free_memory
from suture.core.recording import shapes_of

_STEPS = 256  # whose positions are sent in one copy
_SHARE = 0.25  # of the free memory; the rest is for passes

#: Step → the positions of every task's batch, (batch,) each, on the CPU.
Batches = Callable[[int], Sequence[Tensor]]


class Resident:
    """Fields, such as inputs and their targets, of all tasks end to end on a device.

    `fields`: one entry for each task, with as many inputs in each field. Batches are drawn as they are elsewhere; only
    their positions go to the device, those of many steps in one copy.
    """

    def __init__(self, fields: Sequence[Sequence[Any]], batches: Batches, steps: int, device: torch.device):
        counts = [size(task) for task in fields[0]]
        self.fields = [_end_to_end(tasks, device) for tasks in fields]
        self.batches, self.steps, self.device = batches, steps, device
        self._starts = torch.tensor([0, *accumulate(counts[:-1])])[:, None]
        self._first, self._sent = 0, torch.empty(0)

    def positions(self, step: int) -> Int[Tensor, "task batch"]:
        """The positions of a step's batches in the fields, on the device."""
        if not self._first <= step < self._first + len(self._sent):
            following = range(step, min(step + _STEPS, self.steps))
            block = torch.stack([torch.stack(list(self.batches(each))) + self._starts for each in following])
            self._first, self._sent = step, sent(block, self.device)
        return self._sent[step - self._first]

    def take(self, positions: Int[Tensor, "task batch"]) -> list[Any]:
        """The rows of every field at some positions, the batches of all tasks end to end."""
        return [take(field, positions.flatten()) for field in self.fields]


def resident(
    fields: Sequence[Sequence[Any]], batches: Batches, steps: int | None, device: torch.device
) -> Resident | None:
    """The fields on the device; None where they do not fit, or tasks differ in shape, and on a CPU."""
    free = free_memory(device)
    if free is None or steps is None:
        return None
    if any(len({shapes_of(take(task, slice(0, 1))) for task in tasks}) > 1 for tasks in fields):
        return None
    if sum(nbytes(task) for tasks in fields for task in tasks) > _SHARE * free:
        return None
    return Resident(fields, batches, steps, device)


def _end_to_end(tasks: Sequence[Any], device: torch.device) -> Any:
    first = tasks[0]
    if isinstance(first, Mapping):
        return {key: _end_to_end([task[key] for task in tasks], device) for key in first}
    if isinstance(first, tuple | list):
        return tuple(_end_to_end(parts, device) for parts in zip(*tasks, strict=True))
    whole = torch.empty(sum(map(len, tasks)), *first.shape[1:], dtype=first.dtype, device=device)
    for part, own in zip(whole.split([len(task) for task in tasks]), tasks, strict=True):
        part.copy_(own)
    return whole
