"""Names and numbers of classes, compared with a task's: accuracy under another order is that of a shuffled head."""

import re
from collections.abc import Sequence
from difflib import get_close_matches

from suture.errors import data_refusal, problem, shown

_SHOWN = 5


def plain(name: object) -> str:
    """A name without case, spaces and punctuation, unless it is made of nothing else.

    >>> plain("Polka_Dotted"), plain("+")
    ('polkadotted', '+')
    """
    return re.sub(r"[^a-z0-9]", "", str(name).lower()) or str(name)


def whole_number(value: object) -> int | None:
    """A label as a number; None for what is none: text, a missing value, a fraction.

    >>> whole_number(3), whole_number("3"), whole_number(3.0), whole_number(0.7), whole_number(None)
    (3, 3, 3, None, None)
    """
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"-?[0-9]{1,18}", value) else None
    return int(value) if isinstance(value, int) else None


def places(*names: Sequence[str]) -> dict[str, int]:
    """The label of every plain name; several sequences are several ways of naming the same classes."""
    return {plain(name): label for sequence in names for label, name in enumerate(sequence)}


def numbered(labels: Sequence[object], names: Sequence[str], classes: int, where: object) -> list[int]:
    """Labels as numbers, each that of a class; text is looked up among the names."""
    known, numbers = places(names), []
    named = any(isinstance(label, str) for label in labels)
    for row, label in enumerate(labels):
        number = known.get(plain(label)) if named and isinstance(label, str) else whole_number(label)
        if number is None:
            what = "is not among the class names" if isinstance(label, str) else "is no whole number"
            found = f"has the label {shown(label)!r} in row {row}, which {what}"
            raise data_refusal(where, found, "give every row the name or the number of a class")
        if not 0 <= number < classes:
            found = f"has the label {number} in row {row} but there are {classes} class names"
            raise data_refusal(where, found, "list a name for every label")
        numbers.append(number)
    return numbers


def misnamed(found: Sequence[str], wanted: Sequence[str], where: object) -> list[str]:
    """A problem where the names cannot be in this order; names that only differ in wording are let pass."""
    if len(found) != len(wanted):
        found_and_wanted = f"has {len(found)} classes but there are {len(wanted)} class names"
        return [problem(where, found_and_wanted, "list one name for every class, in the order of the labels")]
    known = places(wanted)
    for label, name in enumerate(found):
        place = known.get(plain(name), label)
        if place != label:
            names = (
                f"is {shown(name)!r}, but the class names have {wanted[label]!r} there and {shown(name)!r} at {place}"
            )
            return [f"label {label} of {problem(where, names, 'list them in the order of the labels')}"]
    return []


def misnumbered(
    lowest: int, highest: int, classnames: Sequence[str], where: object, last: int | None = None
) -> list[str]:
    """A problem where labels and class names are not one to one; `last` is the highest label of all splits."""
    end, last = len(classnames) - 1, highest if last is None else last
    if lowest < 0 or highest > end:
        found = f"down to {lowest}" if lowest < 0 else f"up to {highest}"
        labels = f"has labels {found} but there are {len(classnames)} class names (labels 0 to {end})"
        return [problem(where, labels, "list a name for every label")]
    if 0 <= last < end:
        labels = f"has labels that end at {last} but there are {len(classnames)} class names"
        return [problem(where, labels, "list a name for every label and no more")]
    return []


def nearest(name: object, candidates: Sequence[str]) -> str:
    """A hint for a name that is not among the candidates; empty where none is like it."""
    near = get_close_matches(str(name), candidates, n=1, cutoff=0.4)
    return f" (nearest: {near[0]!r})" if near else ""


def shortened(problems: list[str]) -> list[str]:
    """The first few problems about class names, and how many more there are."""
    more = len(problems) - _SHOWN
    return problems if more <= 1 else [*problems[:_SHOWN], f"and {more} more class names that do not fit."]
