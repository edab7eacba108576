"""Random numbers that depend on where an entry is, and on nothing that was drawn before.

The uniform number of an entry is a hash of (seed, model, tensor, position), so a result depends on neither the order of
the models, nor the slices, nor the threads. The hash is SplitMix64 (Steele, Lea and Flood 2014).
"""

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

_GAMMA, _FIRST, _SECOND = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))

_BLOCK = 1 << 16  # hashes that are made at once; shorter blocks cost threads more in turns than the cache saves
_HALF = "<u4"  # the lower half first, whatever the machine
_BITS = 24  # of a number that is drawn
_A_HALF = np.uint32(0x3F000000)  # the bits of 0.5: added to 24 bits they are those of a float from 0.5 to 2, in order
_STEPS = np.arange(1, _BLOCK + 1, dtype="<u8") * _GAMMA


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
    drawn = _drawn(seed, place, count)
    return (
        torch.from_numpy(drawn.view(f"{_HALF[0]}i4")).to(torch.float32).mul_(2**-_BITS)[:, place.start % 2 :][:, :count]
    )


def chosen(seed: int, place: Place, count: int, share: Sequence[float]) -> Float[Tensor, "task entry"]:
    """1 where `uniforms` is below the model's share and 0 elsewhere, for less than the numbers themselves cost.

    >>> place = Place("w", ["a", "b"])
    >>> torch.equal(chosen(0, place, 5, [0.5, 0.5]), (uniforms(0, place, 5) < 0.5).float())
    True
    """
    drawn = _drawn(seed, place, count)
    drawn += _A_HALF
    chosen = torch.from_numpy(drawn.view(f"{_HALF[0]}f4"))
    for row, part in zip(chosen, share, strict=True):
        bound = np.uint32(math.ceil(part * 2**_BITS)) + _A_HALF
        torch.lt(row, float(bound.view(np.float32)), out=row)  # 1 or 0 in the same memory: faster than a mask
    return chosen[:, place.start % 2 :][:, :count]


def _drawn(seed: int, place: Place, count: int) -> np.ndarray:
    """(task, entry) integers of 24 bits, from the even position at or before the place on."""
    odd = place.start % 2
    drawn = np.empty((len(place.models), 2 * -(-(count + odd) // 2)), dtype=_HALF)
    for row, model in zip(drawn, place.models, strict=True):
        key, first = _key(seed, model, place.tensor), (place.start - odd) // 2
        for start in range(0, len(row), 2 * _BLOCK):
            part = row[start : start + 2 * _BLOCK]
            np.right_shift(
                _hashes(key, first + start // 2, len(part) // 2).view(_HALF), np.uint32(32 - _BITS), out=part
            )
    return drawn


def _hashes(key: int, first: int, count: int) -> np.ndarray:
    """SplitMix64 of the numbers first, first + 1, …"""
    z = _STEPS[:count] + np.uint64((key + first * int(_GAMMA)) % 2**64)
    scratch = np.empty_like(z)
    for shift, factor in ((30, _FIRST), (27, _SECOND), (31, None)):
        z ^= np.right_shift(z, np.uint64(shift), out=scratch)
        if factor is not None:
            z *= factor
    return z


def somewhere(rows: Tensor) -> Place:
    """A place for rows that come without one: models are named by their number."""
    return Place("", [str(number) for number in range(len(rows))])


def _key(seed: int, model: str, tensor: str) -> int:
    digest = hashlib.sha256("\0".join((str(seed), model, tensor)).encode()).digest()
    return int.from_bytes(digest[:8], "little")
