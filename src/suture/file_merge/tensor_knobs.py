"""Knobs that differ from tensor to tensor: a value, a gradient over the layers, or a list of filters.

    0.3                                                  for every tensor
    [0.0, 0.5, 1.0]                                      from the first layer to the last, straight lines between
    [{filter: self_attn, value: 0.3}, {value: 0.5}]      the first whose filter is in the tensor's name

A value behind a filter may be a gradient. Tensors outside the layers take a gradient's first value, and those that no
filter fits take the knob's default.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from suture.core.knobs import Knobs, value_between
from suture.errors import ConfigError, unknown_name
from suture.merging.registry import MergeMethod

_LAYER = re.compile(r"(?:^|\.)(\d{1,9})(?:\.|$)")
_LISTS = ("weights", "remove_keys", "as_matrix", "as_vector")  # knobs whose value is a list
_WHOLE = ("split",)  # knobs whose value names tensors itself
UNSET = object()


@dataclass(frozen=True)
class TensorKnobs:
    """The knobs of every tensor, checked; `values_of(name)` gives those of one as they were written."""

    method: MergeMethod
    values_of: Callable[[str], Mapping[str, Any]]
    names: Sequence[str]

    def knobs_of(self, name: str) -> Mapping[str, Any]:
        """The validated knobs of one tensor."""
        return self._by_name[name]

    def check(self) -> None:
        """Refuse what does not fit any of the tensors (`ConfigError`)."""
        _ = self._by_name

    @cached_property
    def _by_name(self) -> dict[str, Mapping[str, Any]]:
        known: dict[str, Mapping[str, Any]] = {}
        by_name = {}
        for name in self.names:
            values = self.values_of(name)
            key = repr(values)
            if key not in known:
                known[key] = self.method.knobs.validate(values)
            by_name[name] = known[key]
        _check_scope(self.method, list(known.values()))
        return by_name


def tensor_knobs(method: MergeMethod, values: Mapping[str, Any], names: Sequence[str]) -> TensorKnobs:
    """The knobs of every tensor, from values, gradients and filters."""
    method.knobs.validate({knob: value for knob, value in values.items() if not isinstance(value, list | Mapping)})
    depths = depth_of(names)

    def values_of(name: str) -> dict[str, Any]:
        own = {
            knob: value if knob in _WHOLE else value_at(value, name, depths(name), knob in _LISTS)
            for knob, value in values.items()
        }
        return {knob: value for knob, value in own.items() if value is not UNSET}

    return TensorKnobs(method, values_of, names)


def _check_scope(method: MergeMethod, all_knobs: Sequence[Mapping[str, Any]]) -> None:
    """Refuse knobs that differ from tensor to tensor where the whole model decides."""
    if not any(knobs.get("scope") == "model" for knobs in all_knobs):
        return
    gathered = Knobs(method.name, method.gather).defaults if method.gather is not None else {}
    for knob in dict.fromkeys(("scope", *gathered, "merge_func", "weights")):
        if len({repr(knobs.get(knob)) for knobs in all_knobs}) > 1:
            raise ConfigError(
                f"method.{knob} differs between tensors, but method.scope=model looks at all of them at once. "
                "Remedy: give one value, or method.scope=tensor."
            )


def value_at(setting: Any, name: str, depth: float, is_list: bool = False) -> Any:
    """The value of a setting for one tensor; `depth` is 0 at the first layer and 1 at the last."""
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, Sequence) or isinstance(setting, str):
        return setting
    if setting and all(isinstance(rule, Mapping) for rule in setting):
        for rule in setting:
            if unknown := set(rule) - {"filter", "value"}:
                raise ConfigError(unknown_name("key of a filter", str(min(unknown, key=str)), ["filter", "value"]))
            if rule.get("filter") in (None, "*") or str(rule["filter"]) in name:
                return value_at(rule.get("value"), name, depth, is_list)
        return UNSET
    return list(setting) if is_list else _interpolated(setting, depth)


def _interpolated(stops: Sequence[Any], depth: float) -> float:
    if not stops or not all(isinstance(stop, int | float) and not isinstance(stop, bool) for stop in stops):
        raise ConfigError(f"{list(stops)!r} is no gradient. Remedy: give numbers, from the first layer to the last.")
    return value_between(stops, depth)


def depth_of(names: Iterable[str]) -> Callable[[str], float]:
    """The depth of a tensor in the model: its layer's number over that of the last of its stack of layers."""
    last: dict[str, int] = {}
    for name in names:
        if match := _LAYER.search(name):
            stack = name[: match.start(1)]
            last[stack] = max(last.get(stack, 0), int(match[1]))

    def depth(name: str) -> float:
        match = _LAYER.search(name)
        if match is None:
            return 0.0
        end = last[name[: match.start(1)]]
        return int(match[1]) / end if end else 1.0

    return depth
