"""Loops over slices that numba compiles: each block of entries is read once and stays in the first cache.

Every kernel gives the bits of the plain path beside it. The compiler may neither reorder sums nor fuse a product with a
sum: `fastmath` stays off. Kernels take addresses, so that one compiled loop serves any number of models in any mixture
of dtypes; whoever calls one keeps the tensors alive. They release Python's lock.
"""

import inspect

import numpy as np
from numba import carray, njit, types  # pyright: ignore[reportPrivateImportUsage]
from numba.extending import intrinsic

BLOCK = 1024  # entries: the rows of eight models fill half of a first cache
FLOAT32, BFLOAT16, FLOAT16 = range(3)
SUM, MEAN, LARGEST = range(3)
_EXPONENT = np.int32(0x7F800000)  # patterns of |x| from here on are Inf and NaN
_HALF_EXPONENT = np.uint32(0x7C00)
_MAGNITUDE, _SIGN = np.int32(0x7FFFFFFF), np.uint32(0x80000000)
_TO_FLOAT32 = np.float32(2.0**112)  # 2^(127 − 15): the difference of the exponents' biases
_GAMMA, _FIRST, _SECOND = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_30, _27, _31, _ONE = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(1)
_13, _16 = np.uint32(13), np.uint32(16)


def _compiled(function):
    """Compiled when it is first called, and kept on disk for later processes."""
    original = inspect.unwrap(function)  # numba compiles no wrapper, such as a checker of types puts around it
    return njit(nogil=True, cache=True, error_model="numpy")(original)


def _pointer(element):
    @intrinsic
    def pointer(context, address):
        def generate(compiler, builder, signature, arguments):
            return builder.inttoptr(arguments[0], compiler.get_value_type(signature.return_type))

        return types.CPointer(element)(types.int64), generate

    return pointer


_floats, _halves = _pointer(types.float32), _pointer(types.uint16)


@_compiled
def _widen(address, kind, start, count, out):
    """`count` entries of a slice from `start` on, as float32."""
    if kind == FLOAT32:
        floats = carray(_floats(address + 4 * start), count)  # pyright: ignore[reportCallIssue]
        for i in range(count):
            out[i] = floats[i]
        return
    halves = carray(_halves(address + 2 * start), count)  # pyright: ignore[reportCallIssue]
    bits = out.view(np.uint32)
    if kind == BFLOAT16:
        for i in range(count):
            bits[i] = np.uint32(halves[i]) << _16
        return
    for i in range(count):
        bits[i] = (np.uint32(halves[i]) & np.uint32(0x7FFF)) << _13
    for i in range(count):
        out[i] *= _TO_FLOAT32
    for i in range(count):
        half = np.uint32(halves[i])
        special = np.uint32(_EXPONENT) if (half & _HALF_EXPONENT) == _HALF_EXPONENT else np.uint32(0)
        bits[i] |= ((half & np.uint32(0x8000)) << _16) | special


@_compiled
def _largest(row, count, worst):
    """The largest pattern of a magnitude in a row, or `worst` if that is larger."""
    bits = row.view(np.int32)
    for i in range(count):
        pattern = np.int32(bits[i] & _MAGNITUDE)
        worst = pattern if pattern > worst else worst
    return worst


@_compiled
def _difference(row, base, count):
    for i in range(count):
        row[i] -= base[i]


@_compiled
def _trim(row, count, below):
    for i in range(count):
        row[i] = np.float32(0) if (row[i] >= -below) & (row[i] <= below) else row[i]


@_compiled
def _elect(rows, tasks, count, side, total):
    """The sums of the columns, and their sides: +1, or −1 for a negative sum and for −0."""
    for i in range(count):
        total[i] = rows[0, i]
    for t in range(1, tasks):
        for i in range(count):
            total[i] += rows[t, i]
    patterns, sides = total.view(np.uint32), side.view(np.uint32)
    for i in range(count):
        sides[i] = np.uint32(0x3F800000) | (patterns[i] & _SIGN)


@_compiled
def _disjoint(rows, tasks, count, side, weights, weighted, how, merged, mass):
    """Sum, mean or largest of the entries on each column's side, into `merged`."""
    zero, one = np.float32(0), np.float32(1)
    for i in range(count):
        merged[i] = zero
        mass[i] = zero
    for t in range(tasks):
        row, weight = rows[t], weights[t]
        if how == LARGEST:
            for i in range(count):
                agreeing = row[i] * side[i]
                merged[i] = agreeing if agreeing > merged[i] else merged[i]
        else:
            for i in range(count):
                agreeing = row[i] * side[i]
                merged[i] += agreeing if agreeing > zero else zero
        if how == MEAN:
            for i in range(count):
                mass[i] += weight if row[i] * side[i] > zero else zero
    for i in range(count):
        merged[i] *= side[i]
    if how == MEAN and weighted:
        for i in range(count):
            merged[i] /= one if abs(mass[i]) < np.float32(1e-8) else mass[i]
    elif how == MEAN:
        for i in range(count):
            merged[i] /= mass[i] if mass[i] > one else one


@_compiled
def ties(models, kinds, base, base_kind, count, below, weights, weighted, how, scale, out):
    """TIES of one slice into `out`; returns (finite, votes, whether columns cancel)."""
    tasks = len(models)
    rows, origin = np.empty((tasks, BLOCK), np.float32), np.empty(BLOCK, np.float32)
    side, total = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    mass = np.empty(BLOCK, np.float32)
    worst, votes, cancelled = np.int32(0), 0, 0
    for start in range(0, count, BLOCK):
        n = min(BLOCK, count - start)
        _widen(base, base_kind, start, n, origin)
        worst = _largest(origin, n, worst)
        for t in range(tasks):
            row = rows[t]
            _widen(models[t], kinds[t], start, n, row)
            _difference(row, origin, n)
            worst = _largest(row, n, worst)
            _trim(row, n, below[t])
            if weighted:
                for i in range(n):
                    row[i] *= weights[t]
        if worst >= _EXPONENT:
            return False, 0, False
        merged = out[start : start + n]
        _elect(rows, tasks, n, side, total)
        _disjoint(rows, tasks, n, side, weights, weighted, how, merged, mass)
        for i in range(n):
            votes += np.int64(total[i] > 0) - np.int64(total[i] < 0)
        for i in range(n):
            cancelled += np.int64((total[i] == 0) & (merged[i] > 0))
        for i in range(n):
            merged[i] *= scale
        for i in range(n):
            merged[i] += origin[i]
    return True, votes, cancelled > 0


@_compiled
def dare(models, kinds, base, base_kind, count, keys, first, bounds, divisors, divide, weights, weighted, scale, out):
    """DARE of one slice into `out`, which begins at entry `first` of its tensor; returns whether all is finite.

    `keys` are those of the random numbers, `bounds` the largest draws that keep an entry.
    """
    row, origin = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    total = np.empty(BLOCK, np.float32)
    hashes = np.empty(BLOCK // 2 + 1, np.uint64)
    worst = np.int32(0)
    for start in range(0, count, BLOCK):
        n = min(BLOCK, count - start)
        _widen(base, base_kind, start, n, origin)
        worst = _largest(origin, n, worst)
        for i in range(n):
            total[i] = np.float32(0)
        for t in range(len(models)):
            _widen(models[t], kinds[t], start, n, row)
            _difference(row, origin, n)
            worst = _largest(row, n, worst)
            drawn = _draw(keys[t], first + start, n, hashes)
            bound = bounds[t]
            for i in range(n):
                row[i] *= np.float32(1) if drawn[i] <= bound else np.float32(0)
            if divide:
                for i in range(n):
                    row[i] /= divisors[t]
            if weighted:
                for i in range(n):
                    row[i] *= weights[t]
            for i in range(n):
                total[i] += row[i]
        if worst >= _EXPONENT:
            return False
        for i in range(n):
            total[i] *= scale
        merged = out[start : start + n]
        for i in range(n):
            merged[i] = total[i] + origin[i]
    return True


@_compiled
def _draw(key, position, count, hashes):
    """The 32-bit draws of `counter_random` of some entries: the halves of SplitMix64, the lower one first."""
    odd = position & 1
    half = (count + odd + 1) // 2
    first = np.uint64(key) + np.uint64(position >> 1) * _GAMMA
    for i in range(half):
        z = first + (np.uint64(i) + _ONE) * _GAMMA
        z = (z ^ (z >> _30)) * _FIRST
        z = (z ^ (z >> _27)) * _SECOND
        hashes[i] = z ^ (z >> _31)
    return hashes.view(np.uint32)[odd : odd + count]


@_compiled
def linear(models, kinds, base, base_kind, count, deltas, weights, weighted, factor, divide, out):
    """The sum of models or task vectors of one slice into `out`, and whether all is finite.

    With `deltas`: base + factor · Σ. Without, Σ, divided by the factor with `divide`.
    """
    row, origin = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    total = np.empty(BLOCK, np.float32)
    worst = np.int32(0)
    for start in range(0, count, BLOCK):
        n = min(BLOCK, count - start)
        _widen(base, base_kind, start, n, origin)
        worst = _largest(origin, n, worst)
        for i in range(n):
            total[i] = np.float32(0)
        for t in range(len(models)):
            _widen(models[t], kinds[t], start, n, row)
            if deltas:
                _difference(row, origin, n)
            worst = _largest(row, n, worst)
            if weighted:
                for i in range(n):
                    row[i] *= weights[t]
            for i in range(n):
                total[i] += row[i]
        if worst >= _EXPONENT:
            return False
        merged = out[start : start + n]
        if deltas:
            for i in range(n):
                total[i] *= factor
            for i in range(n):
                merged[i] = origin[i] + total[i]
        elif divide:
            for i in range(n):
                merged[i] = total[i] / factor
        else:
            for i in range(n):
                merged[i] = total[i]
    return True


@_compiled
def magnitudes(models, kinds, base, base_kind, count, deltas, rows, low, high, shift, above, inside, bins):
    """For each search, how many magnitudes of its row exceed `high`, and the bins of those in [low, high].

    `rows` are the searches' rows, in ascending order. Writes `above` (search,), `inside` (search,), the number of
    those bins, and `bins` (search, entry).
    """
    row, origin = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    patterns = row.view(np.int32)
    above[:] = 0
    inside[:] = 0
    for start in range(0, count, BLOCK):
        n = min(BLOCK, count - start)
        if deltas:
            _widen(base, base_kind, start, n, origin)
        current = -1
        for s in range(len(rows)):
            if rows[s] != current:
                current = rows[s]
                _widen(models[current], kinds[current], start, n, row)
                if deltas:
                    _difference(row, origin, n)
                for i in range(n):
                    patterns[i] &= _MAGNITUDE
            lowest, width = np.int32(low[s]), np.uint32(high[s] - low[s])
            more = 0
            for i in range(n):
                more += np.int64(patterns[i] > np.int32(high[s]))
            above[s] += more
            found = inside[s]
            for i in range(n):
                offset = np.uint32(patterns[i] - lowest)
                bins[s, found] = np.int32(offset >> np.uint32(shift[s]))
                found += np.int64(offset <= width)
            inside[s] = found


@_compiled
def add_counts(counts, bins):
    """Count the bins."""
    for i in range(len(bins)):
        counts[bins[i]] += 1
