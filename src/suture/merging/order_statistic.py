"""The exact k-th smallest magnitude of every row of a stream, without sorting or storing the stream.

The magnitudes of IEEE floats are ordered like their bit patterns, so counting bit patterns finds the k-th value. A
sample gives a bracket; one pass then counts the entries above it and makes a histogram of those inside. If the sample
was misleading, or the bracket holds more patterns than bins, the search continues in the bin that holds the rank.

Where float32 and float64 chunks are mixed, all are counted as float64, which represents every float32 exactly.
"""

import threading
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

_SAMPLE = 1 << 18
_BINS = 1 << 20
_SMALLEST_SAMPLE, _SAMPLED = 1 << 17, 32  # a small tensor's sample is one entry in _SAMPLED, but at least this many
_FEWEST_BINS = 1 << 14
_MANY = 8  # with more rows than this, or several ranks, each search gets a quarter of the sample and of the bins


def kth_magnitudes(deltas, rank: int | Sequence[int]) -> Float[Tensor, " task"]:
    """The `rank`-th smallest |entry| (1-based) of each row of a `DeltaStream`; 0 for rank 0.

    `rank` is one number for all rows, or one per row. The result has the widest dtype of the stream.
    """
    return _order_statistics(deltas, [rank])[0]


def order_statistics(deltas, ranks: Sequence[int]) -> Float[Tensor, "rank task"]:
    """As `kth_magnitudes`, for several ranks, each that of all rows, in the passes of the slowest of them."""
    return _order_statistics(deltas, ranks)


def _order_statistics(deltas, chosen: Sequence[int | Sequence[int]]) -> Float[Tensor, "rank task"]:
    fewer = _thinner(1, len(chosen))
    sample = deltas.sample(min(_SAMPLE >> fewer, max(_SMALLEST_SAMPLE, deltas.num_entries // _SAMPLED)))
    ranks = [[rank] * len(sample) if isinstance(rank, int) else list(rank) for rank in chosen]
    if sample.shape[1] == deltas.num_entries or max(map(max, ranks)) <= 0:
        return torch.stack([_sorted_out(sample.abs(), each) for each in ranks])
    thinner = _thinner(len(sample), len(ranks))
    sample, bins = sample[:, :: 1 << thinner - fewer].contiguous(), _BINS >> thinner
    bins = min(bins, max(_FEWEST_BINS, 1 << (deltas.num_entries >> 3).bit_length()))
    dtype = sample.dtype
    searches = [
        [
            _Search(_patterns(row, dtype), max(1, r), deltas.num_entries, bins)
            for row, r in zip(sample, each, strict=True)
        ]
        for each in ranks
    ]
    everything = [search for each in searches for search in each]

    while not all(search.done for search in everything):
        count = _Count(list(zip(*searches, strict=True)), dtype)
        deltas.tally(count, [search.counts for search in everything if not search.done])
        for search in everything:
            search.narrow()
    values = np.array([[search.low for search in each] for each in searches])
    float_type = sample[:0].numpy().dtype
    magnitudes = torch.from_numpy(values.astype(f"i{float_type.itemsize}").view(float_type))
    return torch.where(torch.tensor(ranks) > 0, magnitudes, 0.0)


def _sorted_out(rows: Tensor, ranks: Sequence[int]) -> Tensor:
    pairs = zip(rows, ranks, strict=True)
    return torch.stack([row.kthvalue(r).values if r > 0 else row.new_zeros(()) for row, r in pairs])


def share_of(count: int, share: float) -> int:
    """A share of `count` entries, rounded down; the share counts as the decimal number that was written.

    >>> share_of(100, 0.29), int(100 * 0.29)
    (29, 28)
    """
    return int(count * Fraction(repr(float(share))))


def kth_memory(num_rows: int, num_ranks: int = 1) -> int:
    """Bytes that a search for several ranks holds per row: two copies of the sample, a sorted one, and the bins."""
    return num_ranks * (12 * _SAMPLE + 8 * _BINS) >> _thinner(num_rows, num_ranks)


def _thinner(num_rows: int, num_ranks: int) -> int:
    """By how many powers of two samples and bins are smaller, so that many searches fit in memory."""
    return 2 * (num_rows > _MANY or num_ranks > 1)


def _patterns(row: Tensor, dtype: torch.dtype) -> np.ndarray:
    """|x| in this dtype as integers of the same width, which have the same order."""
    magnitudes = np.abs(row.to(dtype).numpy())
    return magnitudes.view(f"i{magnitudes.itemsize}")


class _Count:
    """One pass of the searches of every row: the `CompiledTally` of the chunks."""

    def __init__(self, searches: Sequence[Sequence["_Search"]], dtype: torch.dtype):
        self.waiting = [[search for search in own if not search.done] for own in searches]
        self.dtype = dtype
        flat = [(row, search) for row, own in enumerate(self.waiting) for search in own]
        self.searches = [search for _, search in flat]
        self.rows = np.array([row for row, _ in flat], dtype=np.int64)
        limits = [(search.low, search.high, search.shift) for search in self.searches]
        self.limits = list(np.array(limits, dtype=np.int64).reshape(-1, 3).T.copy())

    def __call__(self, _: Tensor, chunk: Tensor) -> None:
        for own, row in zip(self.waiting, chunk, strict=True):
            if own:
                patterns = _patterns(row, self.dtype)
                for search in own:
                    search.count(patterns)

    def count(self, loops: Any, slices: Any, deltas: bool) -> bool:
        """Count one chunk with the compiled loops."""
        if self.dtype != torch.float32:
            return False
        above, inside = (np.empty(len(self.searches), dtype=np.int64) for _ in range(2))
        bins = np.empty((len(self.searches), len(slices.base) + 1), dtype=np.int32)
        loops.magnitudes(*slices.arguments, deltas, self.rows, *self.limits, above, inside, bins)
        for search, number, found, own in zip(self.searches, above, inside, bins, strict=True):
            search.add(int(number), lambda counts, own=own[:found]: loops.add_counts(counts, own))
        return True

    def count_on_device(self, rows: Tensor) -> None:
        """Count one chunk where it is; only the few entries inside the brackets leave the device."""
        integers = torch.int64 if self.dtype == torch.float64 else torch.int32
        for own, row in zip(self.waiting, rows, strict=True):
            if not own:
                continue
            patterns = row.to(self.dtype).abs().view(integers)
            for search in own:
                inside = patterns[(patterns >= search.low) & (patterns <= search.high)]
                bins = ((inside - search.low) >> search.shift).cpu().numpy()
                search.add(int((patterns > search.high).sum()), lambda counts, bins=bins: np.add.at(counts, bins, 1))


class _Search:
    """One row's search: the k-th pattern lies in [low, high]; `counts` are those of the current pass."""

    def __init__(self, sample: np.ndarray, rank: int, num_entries: int, bins: int):
        self.num_bins = bins
        self.from_top = num_entries - rank  # the most entries that can be larger
        self.largest = int(np.iinfo(sample.dtype).max)
        self.lock, self.done = threading.Lock(), False
        self._set_bracket(*self._bracket(sample, rank / num_entries))

    def _bracket(self, sample: np.ndarray, quantile: float) -> tuple[int, int]:
        """Six standard deviations of the rank on each side of the sample's quantile; open at the ends of the sample.

        At least a quarter of a percent, because a sample consists of runs of neighbouring entries, which may be alike.
        """
        size, last = len(sample), len(sample) - 1
        margin = 8 + max(0.0025 * size, 6 * (size * quantile * (1 - quantile)) ** 0.5)
        low, high = int(quantile * size - margin), int(quantile * size + margin)
        ends = [rank for rank in (low, high) if 0 < rank < last]
        ordered = np.partition(sample, ends) if ends else sample
        return int(ordered[low]) if low > 0 else 0, int(ordered[high]) if high < last else self.largest

    def _set_bracket(self, low: int, high: int) -> None:
        self.low, self.high = low, high
        self.shift = max(0, (high - low).bit_length() - (self.num_bins.bit_length() - 1))
        self.counts = np.zeros(((high - low) >> self.shift) + 2, dtype=np.int64)  # the bins, and the entries above

    def count(self, patterns: np.ndarray) -> None:
        reaches, exceeds = patterns >= self.low, patterns > self.high
        near = np.flatnonzero(reaches ^ exceeds)  # few, so indices are faster than a mask
        inside = (patterns[near] - self.low) >> self.shift
        self.add(int(np.count_nonzero(exceeds)), lambda counts: np.add.at(counts, inside, 1))

    def add(self, above: int, add_inside: Callable[[np.ndarray], None]) -> None:
        """Add the entries of a chunk that lie above the bracket, and those inside."""
        with self.lock:
            self.counts[-1] += above
            add_inside(self.counts)

    def narrow(self) -> None:
        """Narrow the bracket to the bin that holds the rank; start over with all numbers if the bracket missed it."""
        if self.done:
            return
        at_least = np.cumsum(self.counts[::-1])[::-1]  # entries at or above the start of each bin
        if at_least[-1] > self.from_top or at_least[0] <= self.from_top:
            return self._set_bracket(0, self.largest)
        index = int(np.flatnonzero(at_least > self.from_top)[-1])
        low = self.low + (index << self.shift)
        if self.shift == 0:
            self.low, self.done = low, True
        else:
            self._set_bracket(low, min(low + (1 << self.shift) - 1, self.high))
