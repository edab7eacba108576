"""Random numbers that depend on where an entry is, and on nothing that was drawn before.

The uniform number of an entry is a hash of (seed, model, tensor, position), so a result depends on neither the order of
the models, nor the slices, nor the threads. The hash is SplitMix64 (Steele, Lea and Flood 2014).
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

_GAMMA, _FIRST, _SECOND = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))

_BLOCK = 1 << 18  # entries that are drawn at once; shorter blocks cost threads more in turns than they save
_HALF = "<u4"  # the lower half first, whatever the machine


class Place(NamedTuple):
    """Where a slice lies: the tensor's name, the models' names, and the flat position of its first entry."""

    tensor: str
    models: Sequence[str]
    start: int = 0


def uniforms(seed: int, place: Place, count: int) -> Float[Tensor, "task entry"]:
    """Numbers in [0, 1), in steps of 2⁻²⁴: for every model, one for each of the `count` entries from a place on.

    Two neighbouring entries, the first at an even position, take the two halves of one hash of 64 bits.

    >>> whole = uniforms(0, Place("w", ["a", "b"]), 5)
    >>> torch.equal(whole[1:, 3:], uniforms(0, Place("w", ["b"], start=3), 2))
    True
    """
    odd = place.start % 2
    drawn = np.empty((len(place.models), 2 * -(-(count + odd) // 2)), dtype=np.float32)
    for row, model in zip(drawn, place.models, strict=True):
        key = _key(seed, model, place.tensor)
        for start in range(0, len(row), _BLOCK):
            _fill(row[start : start + _BLOCK], key, (place.start - odd + start) // 2)
    return torch.from_numpy(drawn[:, odd : odd + count])


def _fill(row: np.ndarray, key: np.uint64, first: int) -> None:
    """Numbers from the hashes of first, first + 1, …"""
    z = np.arange(first + 1, first + 1 + len(row) // 2, dtype="<u8")
    z *= _GAMMA
    z += key
    scratch = np.empty_like(z)
    for shift, factor in ((30, _FIRST), (27, _SECOND), (31, None)):
        z ^= np.right_shift(z, np.uint64(shift), out=scratch)
        if factor is not None:
            z *= factor
    halves = z.view(_HALF)
    halves >>= np.uint32(8)
    np.multiply(halves.view(f"{_HALF[0]}i4"), np.float32(2**-24), out=row)


def somewhere(rows: Tensor) -> Place:
    """A place for rows that come without one: models are named by their number."""
    return Place("", [str(number) for number in range(len(rows))])


def _key(seed: int, model: str, tensor: str) -> np.uint64:
    digest = hashlib.sha256("\0".join((str(seed), model, tensor)).encode()).digest()
    return np.frombuffer(digest[:8], dtype="<u8")[0]
