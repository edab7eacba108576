"""Names and numbers of classes, held against a task's: accuracy under another order is that of a shuffled head."""

import re
from collections.abc import Sequence
from difflib import get_close_matches

_SHOWN = 5


def plain(name: object) -> str:
    """A name without case, spaces and punctuation, unless it is made of nothing else.

    >>> plain("Polka_Dotted"), plain("+")
    ('polkadotted', '+')
    """
    return re.sub(r"[^a-z0-9]", "", str(name).lower()) or str(name)


def places(*names: Sequence[str]) -> dict[str, int]:
    """The label of every plain name; several sequences are several ways of naming the same classes."""
    return {plain(name): label for sequence in names for label, name in enumerate(sequence)}


def misnamed(found: Sequence[str], wanted: Sequence[str], where: object) -> list[str]:
    """A problem where the names cannot be in this order; names that only differ in wording are let pass."""
    if len(found) != len(wanted):
        return [f"'{where}' has {len(found)} classes but there are {len(wanted)} class names."]
    known = places(wanted)
    for label, name in enumerate(found):
        place = known.get(plain(name), label)
        if place != label:
            return [
                f"label {label} of '{where}' is {name!r}, but the class names have {wanted[label]!r} there and "
                f"{name!r} at {place}; list them in the order of the labels."
            ]
    return []


def misnumbered(
    lowest: int, highest: int, classnames: Sequence[str], where: object, last: int | None = None
) -> list[str]:
    """A problem where labels and class names are not one to one; `last` is the highest label of all splits."""
    end, last = len(classnames) - 1, highest if last is None else last
    if lowest < 0 or highest > end:
        found = f"down to {lowest}" if lowest < 0 else f"up to {highest}"
        return [
            f"'{where}' has labels {found} but there are {len(classnames)} class names (labels 0 to {end}); list a "
            "name for every label."
        ]
    if 0 <= last < end:
        return [
            f"there are {len(classnames)} class names but the labels in '{where}' end at {last}; list a name for "
            "every label and no more."
        ]
    return []


def nearest(name: object, candidates: Sequence[str]) -> str:
    """A hint for a name that is not among the candidates; empty where none is like it."""
    near = get_close_matches(str(name), candidates, n=1, cutoff=0.4)
    return f" (nearest: {near[0]!r})" if near else ""


def shortened(problems: list[str]) -> list[str]:
    """The first few problems about class names, and how many more there are."""
    more = len(problems) - _SHOWN
    return problems if more <= 1 else [*problems[:_SHOWN], f"and {more} more class names that do not fit."]
