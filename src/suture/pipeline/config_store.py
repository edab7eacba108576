"""Hydra's store of named configurations: methods, repairs, the user's pools, and methods with knobs of their own."""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from suture.errors import ConfigError, one_line, unknown_name
from suture.merging.registry import MergeMethod
from suture.pipeline.methods import LearnedMethod, all_methods
from suture.pipeline.repairs import JOIN, NONE, Repair
from suture.repairs import repair_kinds

_TYPED = "typed"  # a group of the store, which launchers carry into other processes: stored name → words as typed
_Mergeable = MergeMethod | LearnedMethod


def store_all() -> None:
    """Put all methods and kinds of repair into the store, with the defaults of their signatures."""
    for kind in (NONE, *repair_kinds()):
        store_repair(kind)
    for name, method in _methods().items():
        _store(f"method/{name}", _method_node(method, name))


def store_repair(kind: str) -> None:
    """Put a kind, or a chain of kinds, into the store."""
    _store(f"repair/{kind}", _node(Repair.defaults(kind)))


def store_pool(group: str, stem: str, node: Any, typed: str) -> str:
    """Put a user's pool into the store; returns its name there."""
    return _store_typed(group, stem, node, [f"{group}={typed}"])


@dataclass(frozen=True)
class _Own:
    """A knob of one method or kind of repair: `group.name.knob=text`."""

    group: str
    name: str
    knob: str
    text: str

    @property
    def key(self) -> str:
        return f"{self.group}.{self.name}.{self.knob}"

    def belongs_to(self, choice: str) -> bool:
        return self.name in choice.split(JOIN)


def with_own_knobs(arguments: Sequence[str]) -> list[str]:
    """Arguments in which `method.NAME.knob=value`, a knob of one of several methods, is part of that method's node.

    `repair.KIND.knob=value` is likewise part of every kind and chain that has the kind. Raises `ConfigError` for a name
    that is not chosen, a knob that it lacks, and a value that cannot be read, is a sweep, or is given for all too.
    """
    rest = list(arguments)
    for group, names in (("method", _methods()), ("repair", repair_kinds())):
        chosen = [name for each in rest if each.startswith(f"{group}=") for name in each.partition("=")[2].split(",")]
        if len(chosen) == 1 and JOIN in chosen[0]:  # the keys of a chain are Hydra's own
            continue
        parsed = {each: own for each in rest if (own := _own(group, names, each))}
        rest = [each for each in rest if each not in parsed]
        for own in parsed.values():
            _check_own(own, chosen, rest)
        rest = [_with_stored(group, each, parsed.values()) for each in rest]
    return rest


def _with_stored(group: str, argument: str, given: Collection[_Own]) -> str:
    """An argument, with the names in the store of what it chooses in the group."""
    key, _, names = argument.partition("=")
    return f"{key}={','.join(_stored(group, name, given) for name in names.split(','))}" if key == group else argument


def _own(group: str, names: Collection[str], argument: str) -> _Own | None:
    match = re.match(rf"{group}\.([^=]+)\.(\w+)=", argument)
    return _Own(group, match[1], match[2], argument[match.end() :]) if match and match[1] in names else None


def _check_own(own: _Own, chosen: Sequence[str], others: Sequence[str]) -> None:
    if not any(map(own.belongs_to, chosen)):
        raise ConfigError(f"{own.key}: {own.group}= does not name {own.name}. Remedy: name it there.")
    if any(each.startswith(f"{own.group}.{own.knob}=") for each in others):
        raise ConfigError(
            f"{own.group}.{own.knob} is also given for {own.name} alone. Remedy: leave out one of the two."
        )


def typed_name(name: str) -> str:
    """The name of a group's choice as it was typed."""
    return _typed_words(name)[0].partition("=")[2]


def as_typed(argument: str) -> list[str]:
    """The words that were typed for an argument to Hydra."""
    key, equals, name = argument.partition("=")
    words = _typed_words(name)
    return words if equals and words[0].startswith(f"{key}=") else [argument]


def _typed_words(name: str) -> list[str]:
    from hydra.core.config_store import ConfigStore

    stored = ConfigStore.instance().repo.get(_TYPED, {}).get(f"{name}.yaml")
    return list(stored.node.words) if stored else [f"={name}"]


def _stored(group: str, choice: str, given: Iterable[_Own]) -> str:
    """The name in the store of a method, kind or chain with its own knobs set."""
    if not (knobs := [own for own in given if own.belongs_to(choice)]):
        return choice
    node = _method_node(_methods()[choice], choice) if group == "method" else _node(Repair.defaults(choice))
    words = [f"{group}={choice}"]
    for own in knobs:
        inside = node[own.name] if JOIN in choice else node
        if own.knob not in inside:
            known = [f"{group}.{own.name}.{each}" for each in inside]
            raise ConfigError(unknown_name("key", own.key, known))
        inside[own.knob] = _value(own)
        words.append(f"{own.key if JOIN in choice else f'{group}.{own.knob}'}={own.text}")
    return _store_typed(group, choice.replace(JOIN, "_"), node, words)


def _value(own: _Own) -> Any:
    """A value in Hydra's grammar."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(f"{own.group}.{own.knob}={own.text}")
    except HydraException as error:
        raise ConfigError(f"{own.key}={own.text} cannot be read: {one_line(error)}.") from None
    if override.is_sweep_override():
        raise ConfigError(f"{own.key}={own.text}: wanted one value. Remedy: sweep over {own.group}.{own.knob}.")
    return override.value()


def _store_typed(group: str, stem: str, node: Any, words: Sequence[str]) -> str:
    key = hashlib.sha256(json.dumps([words, node], default=str).encode()).hexdigest()[:8]
    name = f"{stem}_{key}"
    _store(f"{group}/{name}", node)
    _store(f"{_TYPED}/{name}", {"words": list(words)})
    return name


def _methods() -> dict[str, _Mergeable]:
    return {name: method for method in all_methods().values() for name in (method.name, *method.aliases)}


def _method_node(method: _Mergeable, name: str) -> dict[str, Any]:
    defaults = _node(method.knobs.defaults) | ({"after": None} if isinstance(method, MergeMethod) else {})
    return defaults | {"name": name if "name" in defaults else method.name}


def _node(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Knobs as a configuration node; their seed is the run's by default."""
    plain = {knob: list(value) if isinstance(value, tuple) else value for knob, value in defaults.items()}
    return plain | ({"seed": "${seed}"} if "seed" in plain else {})


def _store(path: str, node: Any) -> None:
    from hydra.core.config_store import ConfigStore

    group, _, name = path.rpartition("/")
    ConfigStore.instance().store(group=group, name=name, node=node, provider="suture")
