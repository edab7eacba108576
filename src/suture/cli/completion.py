"""Completion in a shell: a script that holds all names, so that a press of Tab starts no Python."""

from collections.abc import Iterable, Iterator, Mapping
from importlib.resources import files

from suture.cli.catalogue import catalogue
from suture.cli.grammar import EVERYWHERE, VERSION, Key, Option, Verb, shipped_pools

Verbs = Mapping[str, Verb]


def script(shell: str, verbs: Verbs) -> str:
    """The completion script of a shell: its template with all names in it."""
    template = (files("suture.cli") / "shells" / f"suture.{shell}").read_text("utf-8")
    contexts: dict[tuple[str, ...], list[str]] = {}
    for context, names in names_by_context(verbs).items():
        contexts.setdefault(names, []).append(f"'{context}'")
    case, between = (_fish_case, " ") if shell == "fish" else (_case, " | ")
    marks = {
        "@NAMES@": "\n".join(case(shared, " ".join(names)) for names, shared in contexts.items()),
        "@CONFIGURED@": between.join(verb.name for verb in verbs.values() if verb.configuration),
        "@PATHS@": between.join(_pattern(key, shell) for key in _paths(verbs)),
        "@FILES@": between.join(verb.name for verb in verbs.values() if any(a.path for a in verb.arguments)),
    }
    for mark, text in marks.items():
        template = template.replace(mark, text)
    return template


def names_by_context(verbs: Verbs) -> dict[str, tuple[str, ...]]:
    """Names that may be typed: "" at the start, VERB after it, `KEY=` before a value, `method:NAME` its knobs.

    >>> from suture.cli.verbs import VERBS
    >>> "ties_merging" in names_by_context(VERBS)["method="]
    True
    """
    contexts = {verb.name: tuple(_typed(verb)) for verb in verbs.values()}
    contexts[""] = (*verbs, *contexts["run"], *_spellings([VERSION]))
    contexts |= dict(_values_of_keys(verbs))
    return contexts | dict(_methods()) | dict(_repairs())


def _typed(verb: Verb) -> Iterator[str]:
    """The arguments, keys and options of a verb; `models.NAME=` is offered as far as it goes without the name."""
    for argument in verb.arguments:
        yield from argument.values()
    yield from (f"{key.name}=".removesuffix("NAME=") for key in verb.all_keys)
    yield from _spellings((*verb.options, *EVERYWHERE))


def _spellings(options: Iterable[Option]) -> list[str]:
    return [name for option in options for name in option.names]


def _values_of_keys(verbs: Verbs) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The values of every key that has a closed list of them."""
    yield from ((f"{key}=", values) for key, values in catalogue().choices.items())
    yield from ((f"{group}=", shipped_pools(group)) for group in ("modelpool", "taskpool"))
    for key in (key for verb in verbs.values() for key in verb.all_keys):
        if values := tuple(key.values()):
            yield f"{key.name}=", values


def _methods() -> Iterator[tuple[str, tuple[str, ...]]]:
    methods = catalogue().methods.values()
    yield "method=", tuple(name for method in methods for name in method.names)
    for method in methods:
        for name in method.names:
            yield f"method:{name}", tuple(f"method.{knob}=" for knob in method.knobs)
        yield from ((f"method.{name}=", knob.values) for name, knob in method.knobs.items() if knob.values)


def _repairs() -> Iterator[tuple[str, tuple[str, ...]]]:
    for group in ("repair", "surgery"):  # the name, and what it is often called
        yield f"{group}=", ("none", *catalogue().repairs)
        for kind, repair in catalogue().repairs.items():
            yield f"{group}:{kind}", tuple(f"{group}.{knob}=" for knob in repair.knobs)
            yield from ((f"{group}.{name}=", knob.values) for name, knob in repair.knobs.items() if knob.values)


def _paths(verbs: Verbs) -> list[Key]:
    keys = {key.name: key for verb in verbs.values() for key in verb.all_keys if key.path}
    return list(keys.values())


def _pattern(key: Key, shell: str) -> str:
    pattern = f"{key.name.replace('NAME', '*')}="
    return f"'{pattern}'" if shell == "fish" else pattern.removesuffix("*=") + "*" if "*" in pattern else pattern


def _case(contexts: list[str], names: str) -> str:
    return f"        {' | '.join(contexts)}) echo '{names}' ;;"


def _fish_case(contexts: list[str], names: str) -> str:
    return f"        case {' '.join(contexts)}\n            string split ' ' -- '{names}'"
