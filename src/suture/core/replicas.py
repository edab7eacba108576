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
    return in_turn(len(copies), lambda worker, item: function(copies[worker], item), items)


def in_turn(workers: int, function: Callable[[int, T], R], items: Iterable[T]) -> Iterator[R]:
    """`function(worker, item)` for every item, in the order of the items; the workers take them in turn.

    Each worker has one thread, so that it is in one call at a time. One worker alone is this thread.

    >>> list(in_turn(2, lambda worker, item: (worker, item), "abc"))
    [(0, 'a'), (1, 'b'), (0, 'c')]
    """
    if workers == 1:
        yield from (function(0, item) for item in items)
        return
    with ExitStack() as stack:
        pools = [stack.enter_context(ThreadPoolExecutor(1)) for _ in range(workers)]
        running: deque[Future[R]] = deque()
        for i, item in enumerate(items):
            if len(running) == _AHEAD * workers:
                yield running.popleft().result()
            running.append(pools[i % workers].submit(function, i % workers, item))
        while running:
            yield running.popleft().result()
