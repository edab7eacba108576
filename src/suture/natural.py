"""The order in which people read names with numbers in them."""

import re


def natural(name: str) -> list[tuple[int, str]]:
    """A key to sort by: digits count as numbers, so that layers.2 is before layers.10.

    >>> sorted(["layers.10.bias", "layers.2.bias", "embed"], key=natural)
    ['embed', 'layers.2.bias', 'layers.10.bias']
    """
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
