"""Everything suture refuses, in one small tree.

Each message is one line that a user can act on: which file or key, which model, what was found, what was wanted,
what to do. The command line prints it and exits with code 2.
"""

from collections.abc import Iterable
from difflib import get_close_matches


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
    """One line for a name that does not exist: the nearest ones, then all of them."""
    names = sorted(map(str, known))
    near = get_close_matches(str(name), names, n=2, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    return f"Unknown {kind} {name!r}.{hint} Known: {', '.join(names)}."
