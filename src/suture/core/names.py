"""Names, sizes and dtypes for display, and names in the order people expect."""

import re


def sort_key(name: str) -> list[tuple[int, str]]:
    """Sort key that reads digits as numbers: layers.2 comes before layers.10.

    >>> sorted(["layers.10.bias", "layers.2.bias", "embed"], key=sort_key)
    ['embed', 'layers.2.bias', 'layers.10.bias']
    """
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def in_bytes(size: float) -> str:
    """A number of bytes for display, in units of 1000: 350.0 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError


def short(dtype: object) -> str:
    """The short name of a dtype: float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")
