"""An endless data loader."""

from collections.abc import Iterable, Iterator
from typing import Any

from suture.errors import DataError


class InfiniteDataLoader:
    """Batches of a loader, which starts over whenever it ends.

    Raises `DataError` for an empty loader.

    >>> batches = iter(InfiniteDataLoader([1, 2]))
    >>> [next(batches) for _ in range(5)]
    [1, 2, 1, 2, 1]
    """

    def __init__(self, data_loader: Iterable[Any]):
        self.data_loader = data_loader

    def __iter__(self) -> Iterator[Any]:
        while True:
            number = 0
            for batch in self.data_loader:
                number += 1
                yield batch
            if number == 0:
                raise DataError("The loader gives no batch, so it cannot be repeated.")
