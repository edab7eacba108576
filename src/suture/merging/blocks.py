"""Blocks of a model: how deep a tensor lies, from its name."""

import re
from collections.abc import Callable, Iterable

_STAGES = re.compile(r"(?:^|\.)(?:stages|layers)\.(\d{1,9})\.(?:layers|blocks)\.(\d{1,9})(?=\.|$)")
_CONTAINER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block|resblocks)\.(\d{1,9})(?=\.|$)")
_BARE = re.compile(r"^(\d{1,9})(?=\.)")


def block_depths(names: Iterable[str]) -> Callable[[str], float]:
    """The depth of a tensor's block: 0 for the first of its tower and outside of blocks, 1 for the last.

    The block's number is the one after the container of blocks, whatever other numbers the name has. Stages of blocks
    count through. A tower of one block has depth 0.

    >>> depth = block_depths(["0.mlp.0.weight", "1.mlp.0.weight", "2.mlp.0.weight", "head.weight"])
    >>> depth("1.mlp.0.weight"), depth("head.weight")
    (0.5, 0.0)
    """
    towers: dict[str, set[tuple[int, ...]]] = {}
    for name in names:
        if (found := _block(name)) is not None:
            towers.setdefault(found[0], set()).add(found[1])
    order = {tower: {block: i for i, block in enumerate(sorted(blocks))} for tower, blocks in towers.items()}

    def depth(name: str) -> float:
        found = _block(name)
        if found is None or len(order[found[0]]) == 1:
            return 0.0
        return order[found[0]][found[1]] / (len(order[found[0]]) - 1)

    return depth


def _block(name: str) -> tuple[str, tuple[int, ...]] | None:
    """The tower, by the part of the name before its first block, and the block's numbers."""
    match = _STAGES.search(name) or _CONTAINER.search(name) or _BARE.search(name)
    return (name[: match.start(1)], tuple(map(int, match.groups()))) if match else None
