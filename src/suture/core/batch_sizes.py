"""Batch sizes that follow the free memory of a GPU."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from suture.core.batches import Forward, nbytes, size, split, take, to_device
from suture.core.machine import free_memory, memory_of
from suture.errors import ConfigError

AUTO = "auto"
FIXED = 256  # the size with auto on a CPU, over several processes, and where a size is part of the result
_SHARE = 0.7  # of the free memory
_MOST = 4096  # inputs at once: more are no faster
_AHEAD = 3  # batches of inputs on the device: the one that runs, and those that are sent meanwhile

log = logging.getLogger(__name__)


class AutoSize:
    """`batch_size=auto`: sizes from the memory that one and two inputs take, halved where a batch does not fit.

    `chosen`: what is done, "encoded" or "scored" → the size for each model and its inputs.
    """

    def __init__(self):
        self.chosen: dict[str, list[int]] = {}

    def fitting(
        self, what: str, forward: Forward, module: Any, inputs: Any, device: torch.device
    ) -> tuple[int, Forward]:
        """The number of inputs at once, and `forward` for batches that are halved if they do not fit."""
        found, sizes = _measured(forward, module, inputs, device), self.chosen.setdefault(what, [])
        sizes.append(found)
        return found, Halving(forward, partial(sizes.__setitem__, len(sizes) - 1))

    @property
    def notes(self) -> list[str]:
        """A line for the report, if there is something to report."""
        if not self.chosen:
            return []
        ranges = (f"{what} {_range(sizes)}" for what, sizes in self.chosen.items())
        return [f"batch_size=auto, inputs at once: {', '.join(ranges)}."]


#: A number of inputs, or "auto" for as many as fit in the memory of a GPU.
BatchSize = int | Literal["auto"] | AutoSize


class Halving:
    """`forward(module, batch)` in pieces that are half as large from the first one on that does not fit in memory.

    The rows are those of the whole batch, in its order.

    >>> def forward(module, batch):
    ...     if len(batch) > 2:
    ...         raise torch.cuda.OutOfMemoryError
    ...     return 2 * batch
    >>> Halving(forward)(None, torch.arange(5))
    tensor([0, 2, 4, 6, 8])
    """

    def __init__(self, forward: Forward, on_halved: Callable[[int], None] = lambda smaller: None):
        self.forward, self.on_halved = forward, on_halved
        self.most: int | None = None

    def __call__(self, module: Any, batch: Any) -> Tensor:
        while True:
            number = min(size(batch), self.most or size(batch))
            try:
                pieces = [self.forward(module, piece) for piece in split(batch, number)]
                return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
            except torch.cuda.OutOfMemoryError:
                if number == 1:
                    raise
            self.most = number // 2  # here, where the error no longer holds the tensors of its pass
            self.on_halved(self.most)
            log.info("%d inputs do not fit in memory; %d at once from now on", number, self.most)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def fitting(
    batch_size: BatchSize, what: str, forward: Forward, module: Any, inputs: Any, device: torch.device
) -> tuple[int, Forward]:
    """A number of inputs and the function that runs them: those given, or with auto those that fit on the device."""
    if isinstance(batch_size, int):
        return batch_size, forward
    auto = batch_size if isinstance(batch_size, AutoSize) else AutoSize()
    return auto.fitting(what, forward, module, inputs, device)


def fixed_size(batch_size: BatchSize) -> int:
    """The number of inputs at once where it may not follow the memory.

    >>> fixed_size(64), fixed_size("auto")
    (64, 256)
    """
    return batch_size if isinstance(batch_size, int) else FIXED


def check_batch_size(key: str, batch_size: BatchSize) -> None:
    """Raise `ConfigError` for what is neither a positive number nor auto."""
    if isinstance(batch_size, AutoSize) or batch_size == AUTO:
        return
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"{key}={batch_size}: wanted 1 or more, or auto.")


def _measured(forward: Forward, module: Any, inputs: Any, device: torch.device) -> int:
    """The number of inputs that fit, if memory grows by the same number of bytes with each."""
    free = free_memory(device)
    if free is None:
        return FIXED
    first = [to_device(take(inputs, slice(0, count)), device) for count in (1, 1, 2)]  # the first call warms up
    try:
        _, one, two = (memory_of(lambda batch=batch: forward(module, batch), device) for batch in first)
    except torch.cuda.OutOfMemoryError:
        return 1
    own = nbytes(first[0])
    each = max(two - one, own, 1) + _AHEAD * own
    return int(max(1, min(_MOST, (_SHARE * free - one) // each)))


def _range(sizes: Sequence[int]) -> str:
    least, most = min(sizes), max(sizes)
    return f"{most:,}" if least == most else f"{least:,} to {most:,}"
