"""Random numbers that depend on the position of an entry, not on what was drawn before.

The uniform number of an entry is a hash of (seed, model, tensor, position), so it does not depend on the order of the
models, on the slices, or on the threads. The hash is SplitMix64 (Steele, Lea and Flood 2014).
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

_BLOCK = 1 << 16  # hashes computed at once; shorter blocks cost more in calls than they save in cache misses
_HALF = "<u4"  # little-endian on every machine, so that the lower half comes first
_SPARE = 8  # bits of a 32-bit half that are dropped: a float32 has room for 24
_STEPS = np.arange(1, _BLOCK + 1, dtype="<u8") * _GAMMA


#: Names of layers with one row per token: input embeddings, and output layers.
_TOKENS_IN = {"embed_tokens", "word_embeddings", "wte", "shared", "tok_embeddings", "embed_in"}
_TOKENS_OUT = {"lm_head", "embed_out", "output", "output_projection", "decoder"}
_TOKENS = "<tokens>"


class SlicePosition(NamedTuple):
    """The position of a slice: the tensor's name (see `draw_names`), the models' names, and its first flat index."""

    tensor: str
    models: Sequence[str]
    start: int = 0


def uniforms(seed: int, position: SlicePosition, count: int) -> Float[Tensor, "task entry"]:
    """Uniform numbers in [0, 1), multiples of 2⁻²⁴, for every model and each of `count` entries from a position on.

    Two neighbouring entries, the first of them at an even index, take the two halves of one 64-bit hash.

    >>> whole = uniforms(0, SlicePosition("w", ["a", "b"]), 5)
    >>> torch.equal(whole[1:, 3:], uniforms(0, SlicePosition("w", ["b"], start=3), 2))
    True
    """
    numbers = torch.empty(len(position.models), count)
    for row, start, drawn in _drawn(seed, position, count):
        drawn >>= np.uint32(_SPARE)
        numbers[row, start : start + len(drawn)] = torch.from_numpy(drawn.view(f"{_HALF[0]}i4"))
    return numbers.mul_(2.0 ** (_SPARE - 32))


def chosen(
    seed: int, position: SlicePosition, count: int, share: Sequence[float]
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Whether each number of `uniforms` is below its model's share: (model, first entry, bool run), in short runs.

    Cheaper than the numbers themselves. The runs share one buffer: each is valid until the next is produced.

    >>> position = SlicePosition("w", ["a"])
    >>> ((_, _, run),) = chosen(0, position, 5, [0.5])
    >>> run.tolist() == (uniforms(0, position, 5)[0] < 0.5).tolist()
    True
    """
    bounds = draw_bounds(share)
    buffer = np.empty(2 * _BLOCK, dtype=bool)
    for row, start, drawn in _drawn(seed, position, count):
        yield row, start, np.less_equal(drawn, bounds[row], out=buffer[: len(drawn)])


def draw_bounds(share: Sequence[float]) -> list[np.uint32]:
    """The largest 32-bit draw that is below each share."""
    return [np.uint32((math.ceil(part * 2 ** (32 - _SPARE)) << _SPARE) - 1) for part in share]


def _drawn(seed: int, position: SlicePosition, count: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """32-bit integers for every model and entry, in runs that share one buffer: (model, first entry, run)."""
    odd = position.start % 2
    hashes, scratch = (np.empty(min(_BLOCK, -(-(count + odd) // 2)), dtype="<u8") for _ in range(2))
    for row, model in enumerate(position.models):
        key, first = draw_key(seed, model, position.tensor), position.start // 2
        for start in range(-odd, count, 2 * _BLOCK):
            stop = min(start + 2 * _BLOCK, count)
            half = -(-(stop - start) // 2)
            drawn = _hashed(key, first + (start + odd) // 2, hashes[:half], scratch[:half]).view(_HALF)
            yield row, max(start, 0), drawn[max(start, 0) - start : stop - start]


def _hashed(key: int, first: int, z: np.ndarray, scratch: np.ndarray) -> np.ndarray:
    """SplitMix64 of first, first + 1, …, written into `z`."""
    np.add(_STEPS[: len(z)], np.uint64((key + first * int(_GAMMA)) % 2**64), out=z)
    for shift, factor in ((30, _FIRST), (27, _SECOND), (31, None)):
        z ^= np.right_shift(z, np.uint64(shift), out=scratch)
        if factor is not None:
            z *= factor
    return z


def draw_names(names: Iterable[str], aliases: Mapping[str, str]) -> dict[str, str]:
    """The names that enter the hash: each tensor's own name, but one shared name for a model's token table.

    A token table that is tied to the output layer has two names. A module knows both, but a file holds only one of
    them, so neither can be used: the draw would differ between the two. `aliases`: tied name → the first of its names.

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
    """The innermost module that a weight belongs to; "" for any other tensor."""
    module, _, kind = name.rpartition(".")
    return module.rpartition(".")[2] if kind == "weight" else ""


def default_position(rows: Tensor) -> SlicePosition:
    """The position of rows given without one: index 0 of an unnamed tensor, with numbers as the models' names."""
    return SlicePosition("", [str(number) for number in range(len(rows))])


def draw_key(seed: int, model: str, tensor: str) -> int:
    """The 64-bit number from which the hashes of one tensor of one model start."""
    digest = hashlib.sha256("\0".join((str(seed), model, tensor)).encode()).digest()
    return int.from_bytes(digest[:8], "little")
