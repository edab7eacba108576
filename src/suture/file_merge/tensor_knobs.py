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

from suture.errors import ConfigError, unknown_name
from suture.merging.registry import MergeMethod

_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
_LISTS = ("weights", "remove_keys")  # knobs whose value is a list
UNSET = object()


@dataclass(frozen=True)
class Rules:
    """The knobs of every tensor: what `told_of` says for its name, checked."""

    method: MergeMethod
    told_of: Callable[[str], Mapping[str, Any]]
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
            values = self.told_of(name)
            key = repr(values)
            if key not in known:
                known[key] = self.method.knobs.validate(values)
            by_name[name] = known[key]
        _check_scope(list(known.values()))
        return by_name


def settings(method: MergeMethod, told: Mapping[str, Any], names: Sequence[str]) -> Rules:
    """The knobs of every tensor, from values, gradients and filters."""
    method.knobs.validate({knob: value for knob, value in told.items() if not isinstance(value, list | Mapping)})
    depths = depth_of(names)

    def told_of(name: str) -> dict[str, Any]:
        values = {knob: value_at(value, name, depths(name), knob in _LISTS) for knob, value in told.items()}
        return {knob: value for knob, value in values.items() if value is not UNSET}

    return Rules(method, told_of, names)


def _check_scope(found: Sequence[Mapping[str, Any]]) -> None:
    """What is decided over the whole model cannot differ from tensor to tensor."""
    if not any(knobs.get("scope") == "model" for knobs in found):
        return
    for knob in ("scope", "threshold", "merge_func", "weights"):
        if len({repr(knobs.get(knob)) for knobs in found}) > 1:
            raise ConfigError(
                f"method.{knob} differs between tensors, but method.scope=model looks at all of them at once. "
                "Remedy: give one value, or method.scope=tensor."
            )


def value_at(told: Any, name: str, depth: float, is_list: bool = False) -> Any:
    """What a setting says for one tensor; `depth` is 0 at the first layer and 1 at the last."""
    if isinstance(told, Mapping):
        told = [told]
    if not isinstance(told, Sequence) or isinstance(told, str):
        return told
    if told and all(isinstance(rule, Mapping) for rule in told):
        for rule in told:
            if unknown := set(rule) - {"filter", "value"}:
                raise ConfigError(unknown_name("key of a filter", sorted(unknown)[0], ["filter", "value"]))
            if rule.get("filter") in (None, "*") or str(rule["filter"]) in name:
                return value_at(rule.get("value"), name, depth, is_list)
        return UNSET
    return list(told) if is_list else _on_the_way(told, depth)


def _on_the_way(stops: Sequence[Any], depth: float) -> float:
    if not stops or not all(isinstance(stop, int | float) and not isinstance(stop, bool) for stop in stops):
        raise ConfigError(f"{list(stops)!r} is no gradient. Remedy: give numbers, from the first layer to the last.")
    place = depth * (len(stops) - 1)
    before = min(int(place), len(stops) - 1)
    after, share = min(before + 1, len(stops) - 1), place - before
    return (1 - share) * stops[before] + share * stops[after]


def depth_of(names: Iterable[str]) -> Callable[[str], float]:
    """How deep in the model a tensor lies: its layer's number over that of the last of its stack of layers."""
    last: dict[str, int] = {}
    for name in names:
        if found := _LAYER.search(name):
            stack = name[: found.start(1)]
            last[stack] = max(last.get(stack, 0), int(found[1]))

    def depth(name: str) -> float:
        found = _LAYER.search(name)
        if found is None:
            return 0.0
        end = last[name[: found.start(1)]]
        return int(found[1]) / end if end else 1.0

    return depth
