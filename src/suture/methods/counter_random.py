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


class Place(NamedTuple):
    """Where a slice lies: the tensor's name, the models' names, and the flat position of its first entry."""

    tensor: str
    models: Sequence[str]
    start: int = 0


def uniforms(seed: int, place: Place, count: int) -> Float[Tensor, "task entry"]:
    """Numbers in [0, 1), in steps of 2⁻²⁴: for every model, one for each of the `count` entries from a place on.

    >>> whole = uniforms(0, Place("w", ["a", "b"]), 5)
    >>> torch.equal(whole[1:, 3:], uniforms(0, Place("w", ["b"], start=3), 2))
    True
    """
    steps = np.arange(place.start + 1, place.start + count + 1, dtype=np.uint64) * _GAMMA
    rows = [_mixed(steps + _key(seed, model, place.tensor)) >> np.uint64(40) for model in place.models]
    return torch.from_numpy(np.stack(rows).astype(np.float32) * np.float32(2**-24))


def somewhere(rows: Tensor) -> Place:
    """A place for rows that come without one: models are named by their number."""
    return Place("", [str(number) for number in range(len(rows))])


def _key(seed: int, model: str, tensor: str) -> np.uint64:
    digest = hashlib.sha256("\0".join((str(seed), model, tensor)).encode()).digest()
    return np.frombuffer(digest[:8], dtype="<u8")[0]


def _mixed(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * _FIRST
    z = (z ^ (z >> np.uint64(27))) * _SECOND
    return z ^ (z >> np.uint64(31))
