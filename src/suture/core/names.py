"""Names and sizes as people read and sort them."""

import re


def natural(name: str) -> list[tuple[int, str]]:
    """A key to sort by: digits count as numbers, so that layers.2 is before layers.10.

    >>> sorted(["layers.10.bias", "layers.2.bias", "embed"], key=natural)
    ['embed', 'layers.2.bias', 'layers.10.bias']
    """
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def in_bytes(size: float) -> str:
    """A size for people: 350.0 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError


def short(dtype: object) -> str:
    """A dtype's name as people write it: float32."""
    return str(dtype).removeprefix("torch.")
