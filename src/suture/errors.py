"""Everything suture refuses, in one small tree.

Each message is one line that a user can act on: which file or key, which model, what was found, what was wanted,
what to do. The command line prints it and exits with code 2.
"""

from collections.abc import Iterable
from difflib import get_close_matches

PRETRAINED = "_pretrained_"  # the name of the base in pools, and in messages on them
BASE = "base"  # its name in messages where there is no pool: the argument base=…
_LONGEST = 300
_MOST_LISTED = 200  # names in one line: more than suture has methods, fewer than a harness has tasks


class SutureError(Exception):
    """Base of all errors that are the input's fault and not suture's."""


class CheckpointError(SutureError):
    """A checkpoint cannot be read: missing, truncated, corrupt, or a pickle that asks to run code."""


class IncompatibleModels(SutureError):
    """Models that cannot be merged: names, shapes, dtypes or vocabularies differ, or weights are not finite."""


class ConfigError(SutureError):
    """An unknown method, pool, key or value."""


class DataError(SutureError):
    """A dataset that is missing, empty, or does not fit its class names."""


class OutputError(SutureError):
    """The result cannot be written: no space, no permission, or something is already there."""


def unknown_name(kind: str, name: str, known: Iterable) -> str:
    """One line for a name that does not exist: the nearest ones, then all of them, or how many there are."""
    names = sorted(map(str, known))
    near = _near(str(name), names)
    hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    all_known = ", ".join(names) if len(names) <= _MOST_LISTED else f"{len(names):,} others"
    return f"Unknown {kind} {name!r}.{hint} Known: {all_known}."


def _near(name: str, names: list[str]) -> list[str]:
    """Up to two of the names that may be meant: those that begin so, or are nearest.

    >>> _near("glyphs9", ["pools/glyphs8"]), _near("methods.rank", ["method", "seed"])
    (['glyphs8'], ['method.rank'])
    """
    head, dot, rest = name.partition(".")
    heads = {each.partition(".")[0] for each in names}
    if dot and head not in heads and (close := get_close_matches(head, heads, n=1, cutoff=0.8)):
        return [f"{close[0]}.{rest}"]
    ends = names if "/" in name else [each.rpartition("/")[2] for each in names]
    begun = [each for each in ends if len(name) > 2 and each.startswith(name)]
    return begun[:2] or get_close_matches(name, ends, n=2, cutoff=0.5)


def check_known(kind: str, names: Iterable, known: Iterable) -> None:
    """Raise `ConfigError` for the first of some names that does not exist."""
    known = list(known)
    for name in names:
        if name not in known:
            raise ConfigError(unknown_name(kind, shown(name), known))


def shown(text: object) -> str:
    """Text of unknown origin as one printable line of bounded length.

    >>> shown("a\\nb"), shown(10**5000)
    ('a�b', 'int too long to show')
    """
    try:
        whole = str(text)
    except (ValueError, RecursionError):  # numbers of more than 4,300 digits, containers nested without end
        whole = f"{type(text).__name__} too long to show"
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in whole[: _LONGEST + 1])
    return line if len(line) <= _LONGEST else line[:_LONGEST] + "…"


def problem(where: object, found: str, remedy: str) -> str:
    """One line for what is wrong with a file, a model or a value: which one, what was found, what to do.

    >>> problem("base.pt", "is empty", "download it again")
    "'base.pt' is empty. Remedy: download it again."
    """
    return f"'{shown(where)}' {shown(found)}. Remedy: {remedy}."


def refusal(where: object, found: str, remedy: str) -> CheckpointError:
    """The error for a checkpoint that cannot be read."""
    return CheckpointError(problem(where, found, remedy))


def output_refusal(where: object, found: str, remedy: str) -> OutputError:
    """The error for a result that cannot be written."""
    return OutputError(problem(where, found, remedy))


def data_refusal(where: object, found: str, remedy: str) -> DataError:
    """The error for a data set that cannot be read."""
    return DataError(problem(where, found, remedy))


def one_line(error: BaseException) -> str:
    """The message of another library's error, on one printable line of at most 160 characters."""
    return shown(" ".join(str(error).split()))[:160]
