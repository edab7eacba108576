"""Knobs: the keyword-only arguments of a function, with defaults and allowed values read from its signature."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from suture.errors import ConfigError, check_known


@dataclass(frozen=True)
class Knobs:
    """The keyword-only arguments of `function`, which messages call `name`, and those that it shares with others.

    On the command line a knob is written `group.knob=value`, or `knob=value` without a group.
    """

    name: str
    function: Callable[..., Any]
    group: str = "method"
    shared: Callable[..., Any] | None = None

    @cached_property
    def _parameters(self) -> dict[str, inspect.Parameter]:
        return _keyword_only(self.function) | (_keyword_only(self.shared) if self.shared else {})

    def own(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Those of some knobs that `function` itself takes."""
        own = _keyword_only(self.function)
        return {knob: value for knob, value in values.items() if knob in own}

    @property
    def defaults(self) -> dict[str, Any]:
        """Every knob with its default, in the order of the signature."""
        return {name: parameter.default for name, parameter in self._parameters.items()}

    @property
    def annotations(self) -> dict[str, Any]:
        """Every knob with its type."""
        return {name: parameter.annotation for name, parameter in self._parameters.items()}

    @property
    def summary(self) -> str:
        """The first sentence of the function's docstring."""
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]

    @cached_property
    def _schema(self):
        from pydantic import ConfigDict, create_model

        fields: Any = {name: (parameter.annotation, parameter.default) for name, parameter in self._parameters.items()}
        return create_model(self.name, __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **fields)

    def validate(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """All knobs with checked values; raises `ConfigError` for an unknown knob or a value out of its range."""
        from pydantic import ValidationError

        check_known(f"knob of {self.name}", values, self._parameters)
        try:
            return dict(self._schema(**values))
        except ValidationError as error:
            raise ConfigError("; ".join(dict.fromkeys(map(self._in_one_line, error.errors())))) from None

    def _in_one_line(self, error: Mapping[str, Any]) -> str:
        knob = ".".join(filter(None, (self.group, str(error["loc"][0]))))
        return f"{knob}={error['input']!r} does not fit {self.name}: {error['msg']}."


def value_between(stops: Sequence[float], depth: float) -> float:
    """The value at a depth from 0 to 1 on the straight lines between values at equal distances.

    >>> value_between([0.0, 0.5, 2.0], 0.75)
    1.25
    """
    position = depth * (len(stops) - 1)
    before = min(int(position), len(stops) - 1)
    after = min(before + 1, len(stops) - 1)
    share = position - before
    return (1 - share) * stops[before] + share * stops[after]


def _keyword_only(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(function).parameters.items()
    return {name: parameter for name, parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
