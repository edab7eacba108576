"""The registry of merge methods, and what a method's signature says about it.

A method is one function of tensors. Its positional arguments say what it is fed: `base` and either `deltas` (task
vectors, fine-tuned − base) or `models` (the fine-tuned weights themselves), both stacked along a first `task` axis. Its
keyword-only arguments are the knobs; the configuration schema, `--help` and the documentation are read from them.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar

from suture.errors import ConfigError, unknown_name
from suture.knobs import Knobs

_METHODS: dict[str, "MergeMethod"] = {}
_ALIASES: dict[str, str] = {}
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class MergeMethod:
    """One registered method: its function, where it comes from, and its knobs.

    `gather` and `vote` belong to methods that must see the whole model first. `gather(deltas, **knobs)` reads the
    stream of deltas and returns the statistic that the function takes; `vote(base, deltas, statistic, **knobs)` merges
    like the function and also returns what has to be counted over the whole model before some entries are settled.
    """

    name: str
    function: Callable[..., Any]
    paper: str
    aliases: tuple[str, ...] = ()
    gather: Callable[..., Any] | None = None
    vote: Callable[..., Any] | None = None

    @cached_property
    def knobs(self) -> Knobs:
        """The function's knobs: names, defaults and what they may be."""
        return Knobs(self.name, self.function)

    @property
    def operand(self) -> Literal["deltas", "models"]:
        """What the function is fed beside the base."""
        return "models" if "models" in inspect.signature(self.function).parameters else "deltas"


def merge_method(*, paper: str, aliases: tuple[str, ...] = (), gather=None, vote=None) -> Callable[[F], F]:
    """Register the decorated function as a merge method under its own name."""

    def register(function: F) -> F:
        name = function.__name__
        _METHODS[name] = MergeMethod(name, function, paper, aliases, gather, vote)
        _ALIASES.update(dict.fromkeys(aliases, name))
        return function

    return register


def methods() -> dict[str, MergeMethod]:
    """All registered methods by name, sorted."""
    return dict(sorted(_METHODS.items()))


def get_method(name: str) -> MergeMethod:
    """The method of this name or alias; raises `ConfigError` with the nearest names."""
    name = _ALIASES.get(name, name)
    if name not in _METHODS:
        raise ConfigError(unknown_name("method", name, [*_METHODS, *_ALIASES]))
    return _METHODS[name]
