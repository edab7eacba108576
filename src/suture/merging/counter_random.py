"""Random numbers that depend on where an entry is, and on nothing that was drawn before.

The uniform number of an entry is a hash of (seed, model, tensor, position), so a result depends on neither the order of
the models, nor the slices, nor the threads. The hash is SplitMix64 (Steele, Lea and Flood 2014).
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

_GAMMA, _FIRST, _SECOND = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))

_BLOCK = 1 << 16  # hashes that are made at once; shorter blocks cost more in calls than the cache saves
_HALF = "<u4"  # the lower half first, whatever the machine
_SPARE = 8  # bits of the 32 of a half; a float32 has room for the others
_STEPS = np.arange(1, _BLOCK + 1, dtype="<u8") * _GAMMA


#: Layers that hold a row for each token, on the way into a model and on the way out.
_TOKENS_IN = {"embed_tokens", "word_embeddings", "wte", "shared", "tok_embeddings", "embed_in"}
_TOKENS_OUT = {"lm_head", "embed_out", "output", "output_projection", "decoder"}
_TOKENS = "<tokens>"


class Place(NamedTuple):
    """Where a slice lies: the name it is drawn by, the models' names, and the flat position of its first entry."""

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
    numbers = torch.empty(len(place.models), count)
    for row, start, drawn in _drawn(seed, place, count):
        drawn >>= np.uint32(_SPARE)
        numbers[row, start : start + len(drawn)] = torch.from_numpy(drawn.view(f"{_HALF[0]}i4"))
    return numbers.mul_(2.0 ** (_SPARE - 32))


def chosen(seed: int, place: Place, count: int, share: Sequence[float]) -> Iterator[tuple[int, int, np.ndarray]]:
    """Which `uniforms` are below the model's share, in short runs of bool: (model, first entry, run).

    This costs less than the numbers themselves. A run is valid until the next one is asked for.

    >>> place = Place("w", ["a"])
    >>> ((_, _, run),) = chosen(0, place, 5, [0.5])
    >>> run.tolist() == (uniforms(0, place, 5)[0] < 0.5).tolist()
    True
    """
    bounds = [np.uint32((math.ceil(part * 2 ** (32 - _SPARE)) << _SPARE) - 1) for part in share]
    room = np.empty(2 * _BLOCK, dtype=bool)
    for row, start, drawn in _drawn(seed, place, count):
        yield row, start, np.less_equal(drawn, bounds[row], out=room[: len(drawn)])


def _drawn(seed: int, place: Place, count: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """Integers of 32 bits for every model and entry, in runs that share their memory: (model, first entry, run)."""
    odd = place.start % 2
    hashes, scratch = (np.empty(min(_BLOCK, -(-(count + odd) // 2)), dtype="<u8") for _ in range(2))
    for row, model in enumerate(place.models):
        key, first = _key(seed, model, place.tensor), place.start // 2
        for start in range(-odd, count, 2 * _BLOCK):
            stop = min(start + 2 * _BLOCK, count)
            half = -(-(stop - start) // 2)
            drawn = _hashed(key, first + (start + odd) // 2, hashes[:half], scratch[:half]).view(_HALF)
            yield row, max(start, 0), drawn[max(start, 0) - start : stop - start]


def _hashed(key: int, first: int, z: np.ndarray, scratch: np.ndarray) -> np.ndarray:
    """SplitMix64 of the numbers first, first + 1, … in the memory of `z`."""
    np.add(_STEPS[: len(z)], np.uint64((key + first * int(_GAMMA)) % 2**64), out=z)
    for shift, factor in ((30, _FIRST), (27, _SECOND), (31, None)):
        z ^= np.right_shift(z, np.uint64(shift), out=scratch)
        if factor is not None:
            z *= factor
    return z


def draw_names(names: Iterable[str], aliases: Mapping[str, str]) -> dict[str, str]:
    """The names that random numbers are drawn by: a tensor's own, and one for all models' tables of tokens.

    A table that is tied to the head has a name for each. In memory both are known, a file keeps one of them and says
    nothing of the other; so the table is drawn by neither. `aliases`: tied name → the first of its names.

    >>> tied = draw_names(["lm_head.weight", "norm.weight"], {"wte.weight": "lm_head.weight"})
    >>> tied["lm_head.weight"] == draw_names(["wte.weight"], {})["wte.weight"], tied["norm.weight"]
    (True, 'norm.weight')
    """
    groups = {name: [name] for name in names}
    for alias, name in aliases.items():
        groups.get(name, []).append(alias)
    for layers in (_TOKENS_IN, _TOKENS_OUT):
        tables = [name for name, group in groups.items() if any(_layer(each) in layers for each in group)]
        if tables:
            break
    own = {name: name for name in groups}
    return own | {tables[0]: _TOKENS} if len(tables) == 1 else own


def _layer(name: str) -> str:
    """The innermost module that a weight belongs to; "" for what is no weight."""
    module, _, kind = name.rpartition(".")
    return module.rpartition(".")[2] if kind == "weight" else ""


def somewhere(rows: Tensor) -> Place:
    """A place for rows that come without one: models are named by their number."""
    return Place("", [str(number) for number in range(len(rows))])


def _key(seed: int, model: str, tensor: str) -> int:
    digest = hashlib.sha256("\0".join((str(seed), model, tensor)).encode()).digest()
    return int.from_bytes(digest[:8], "little")
