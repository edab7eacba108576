"""Copies of a network on several devices of one process, which share batches out and give their results in order."""

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import TypeVar

import torch
from torch import nn

T = TypeVar("T")
R = TypeVar("R")
_AHEAD = 2  # items that each device has in hand


def on_replicas(
    module: nn.Module, devices: Sequence[torch.device], function: Callable[[nn.Module, T], R], items: Iterable[T]
) -> Iterator[R]:
    """`function(copy, item)` for every item, in the order of the items; the copies are on the `devices` in turn.

    Each device has one thread, so that a copy is in one call at a time. Every item is handled as it would be alone, so
    devices of one kind give the results of one.

    >>> list(on_replicas(nn.Identity(), [torch.device("cpu")] * 2, lambda copy, item: 2 * copy(item), [1, 2, 3]))
    [2, 4, 6]
    """
    copies = [copy.deepcopy(module).to(device) for device in devices]
    with ExitStack() as stack:
        pools = [stack.enter_context(ThreadPoolExecutor(1)) for _ in copies]
        running: deque[Future[R]] = deque()
        for i, item in enumerate(items):
            if len(running) == _AHEAD * len(copies):
                yield running.popleft().result()
            running.append(pools[i % len(pools)].submit(function, copies[i % len(copies)], item))
        while running:
            yield running.popleft().result()
