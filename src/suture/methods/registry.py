"""The registry of merge methods, and what a method's signature says about it.

A method is one function of tensors. Its positional arguments say what it is fed: `base` and either `deltas` (task
vectors, fine-tuned − base) or `models` (the fine-tuned weights themselves), both stacked along a first `task` axis. Its
keyword-only arguments are the knobs; the configuration schema, `--help` and the documentation are read from them.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import inf
from typing import Any, Literal, TypeVar

from suture.errors import ConfigError, unknown_name

_METHODS: dict[str, "MergeMethod"] = {}
_ALIASES: dict[str, str] = {}
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class MergeMethod:
    """One registered method: its function, where it comes from, and its knobs.

    `gather` belongs to methods that must see a whole tensor first, or the whole model if they have a knob `scope` that
    says so: `gather(stream, **knobs)` reads the stream of rows and returns the `statistic` that the function takes.
    `vote(base, deltas, statistic, **knobs)` merges like the function and also returns what has to be counted over the
    whole before some entries are settled. `whole_rows`: the function is fed whole rows of a matrix, not any slice.
    `num_models`: the least and the most models it can merge. A function with a `place` is told where its slice lies.
    """

    name: str
    function: Callable[..., Any]
    paper: str
    aliases: tuple[str, ...] = ()
    gather: Callable[..., Any] | None = None
    vote: Callable[..., Any] | None = None
    whole_rows: bool = False
    num_models: tuple[int, float] = (1, inf)
    _parameters: Mapping[str, inspect.Parameter] = field(init=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "_parameters", inspect.signature(self.function).parameters)

    @property
    def summary(self) -> str:
        """The first sentence of the method's docstring."""
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]

    @property
    def operand(self) -> Literal["deltas", "models"]:
        """What the function is fed beside the base."""
        return "models" if "models" in self._parameters else "deltas"

    @property
    def wants_place(self) -> bool:
        """Whether the function takes a `Place`, as methods that draw random numbers do."""
        return "place" in self._parameters

    def check_number(self, count: int) -> str | None:
        """One line if so many models cannot be merged by this method."""
        least, most = self.num_models
        if least <= count <= most:
            return None
        wanted = f"{least}" if least == most else f"{least} or more" if most == inf else f"{least} to {most}"
        return f"{self.name} merges {wanted} fine-tuned model{'s' * (most > 1)} beside the base; found {count}."

    @property
    def defaults(self) -> dict[str, Any]:
        """Every knob with its default, in the order of the signature."""
        return {name: p.default for name, p in self._parameters.items() if p.kind is p.KEYWORD_ONLY}

    @cached_property
    def _schema(self):
        from pydantic import ConfigDict, create_model

        parameters = self._parameters.items()
        knobs: Any = {n: (p.annotation, p.default) for n, p in parameters if p.kind is p.KEYWORD_ONLY}
        return create_model(self.name, __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **knobs)

    def validate(self, knobs: Mapping[str, Any]) -> dict[str, Any]:
        """All knobs with checked values; raises `ConfigError` for an unknown knob or a value out of its range."""
        from pydantic import ValidationError

        unknown = [name for name in knobs if name not in self.defaults]
        if unknown:
            raise ConfigError(unknown_name(f"knob of {self.name}", unknown[0], self.defaults))
        try:
            return dict(self._schema(**knobs))
        except ValidationError as error:
            raise ConfigError("; ".join(_in_one_line(self.name, e) for e in error.errors())) from None


def merge_method(*, paper: str, aliases: tuple[str, ...] = (), **properties: Any) -> Callable[[F], F]:
    """Register the decorated function as a merge method under its own name; `properties` are those of `MergeMethod`."""

    def register(function: F) -> F:
        name = function.__name__
        _METHODS[name] = MergeMethod(name, function, paper, aliases, **properties)
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


def _in_one_line(method: str, error: Mapping[str, Any]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    return f"method.{key}={error['input']!r} does not fit {method}: {error['msg']}."
