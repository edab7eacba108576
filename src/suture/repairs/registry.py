"""The registry of repair kinds: every function of this package that is decorated with `repair_kind`.

A kind is one function of a `Problem`. Its keyword-only arguments are the knobs; the configuration schema, `--help` and
the documentation are read from them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, TypeVar

from suture.core.discovery import import_all
from suture.core.knobs import Knobs
from suture.errors import check_known

_KINDS: dict[str, "RepairKind"] = {}
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class RepairKind:
    """One kind of repair: `function(problem, **knobs)` fits it and returns a `RepairResult`.

    `scored_while_fitting`: whether a run may score it every few steps, because only its modules change. `static`:
    whether it changes the weights, so that its result is one model for all tasks, which other repairs can start from.
    `whole`: whether each process needs whole weights, so that `fabric.strategy=fsdp` is refused.
    """

    name: str
    function: Callable[..., Any]
    paper: str
    scored_while_fitting: bool = False
    static: bool = False
    whole: bool = False

    @cached_property
    def knobs(self) -> Knobs:
        """The function's knobs: names, defaults and allowed values."""
        return Knobs(f"repair={self.name}", self.function, group="repair")


def repair_kind(*, paper: str, **properties: bool) -> Callable[[F], F]:
    """Register the decorated function as a kind of repair under its own name, with the properties of `RepairKind`."""

    def register(function: F) -> F:
        name = function.__name__
        _KINDS[name] = RepairKind(name, function, paper, **properties)
        return function

    return register


def repair_kinds() -> dict[str, RepairKind]:
    """All kinds by name, sorted."""
    _find()
    return dict(sorted(_KINDS.items()))


def get_repair_kind(name: str) -> RepairKind:
    """The kind of this name; raises `ConfigError` with the nearest names."""
    known = repair_kinds()
    check_known("repair", [name], known)
    return known[name]


@cache
def _find() -> None:
    """Import every module of this package, so that its kinds register themselves."""
    import_all("suture.repairs")
