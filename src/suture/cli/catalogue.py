"""The catalogue: what the command line says about methods, repairs and analyses, without importing them or torch.

`catalogue.json` holds it. `make catalogue` writes the file from the code, and a test compares the two.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suture.errors import check_known

if TYPE_CHECKING:
    from suture.core.knobs import Knobs

FILE = Path(__file__).with_name("catalogue.json")


@dataclass(frozen=True)
class KnobEntry:
    """A knob: its default, what it may be, and its values where the type names them all."""

    default: Any
    range: str
    values: tuple[str, ...] = ()


@dataclass(frozen=True)
class MethodEntry:
    """A method or a kind of repair: its names, docstring, paper and knobs, which are keys of its `group`.

    `inputs`: it needs unlabelled inputs beside the weights.
    """

    name: str
    aliases: tuple[str, ...]
    description: str
    paper: str
    knobs: Mapping[str, KnobEntry]
    group: str = "method"
    inputs: bool = False

    @property
    def summary(self) -> str:
        """The first line of the description."""
        return self.description.partition("\n")[0]

    @property
    def names(self) -> tuple[str, ...]:
        """The name and the aliases."""
        return (self.name, *self.aliases)


@dataclass(frozen=True)
class KeyEntry:
    """A key of `suture analyse`: the analyses that take it, its explanation, and its default as it is typed."""

    analyses: tuple[str, ...]
    explanation: str
    default: str


@dataclass(frozen=True)
class Catalogue:
    """Methods and repairs by name; analyses and their keys; values of other keys."""

    methods: Mapping[str, MethodEntry]
    repairs: Mapping[str, MethodEntry]
    analyses: tuple[str, ...]
    analysis_keys: Mapping[str, KeyEntry]
    choices: Mapping[str, tuple[str, ...]]
    search_defaults: Mapping[str, Any]

    def method(self, name: str) -> MethodEntry:
        """The method or repair of this name or alias; raises `ConfigError` with the nearest names."""
        entries = (*self.repairs.values(), *self.methods.values())
        known = {each: method for method in entries for each in method.names}
        check_known("method or repair", [name], known)
        return known[name]


@cache
def catalogue() -> Catalogue:
    """The catalogue that ships."""
    data = json.loads(FILE.read_text("utf-8"))
    return Catalogue(
        methods={name: _method(values) for name, values in data["methods"].items()},
        repairs={name: _method(values) for name, values in data["repairs"].items()},
        analyses=tuple(data["analyses"]),
        analysis_keys={
            name: KeyEntry(tuple(key["analyses"]), key["explanation"], key["default"])
            for name, key in data["analysis_keys"].items()
        },
        choices={key: tuple(values) for key, values in data["choices"].items()},
        search_defaults=data["search_defaults"],
    )


def _method(values: Mapping[str, Any]) -> MethodEntry:
    knobs = {
        name: KnobEntry(knob["default"], knob["range"], tuple(knob["values"])) for name, knob in values["knobs"].items()
    }
    return MethodEntry(**{**values, "aliases": tuple(values["aliases"]), "knobs": knobs})


def described() -> Catalogue:
    """The catalogue as the code has it; imports every method, repair and analysis."""
    from suture.analysis import analysis_kinds
    from suture.core.knobs import Knobs
    from suture.pipeline.methods import all_methods
    from suture.pipeline.searching import search
    from suture.repairs import repair_kinds

    searched = Knobs("search", search).defaults
    return Catalogue(
        methods={name: _described(method) for name, method in all_methods().items()},
        repairs={name: _described_repair(kind) for name, kind in repair_kinds().items()},
        analyses=tuple(analysis_kinds()),
        analysis_keys=_analysis_keys(),
        choices=_choices(),
        search_defaults={key: searched[key] for key in ("trials", "score", "split", "num_inputs", "groups")},
    )


def _described(method: Any) -> MethodEntry:
    import textwrap

    description = _docstring(method.knobs.function)
    if tensors := getattr(method, "tensors", ""):
        description += "\n\n" + textwrap.fill(tensors, 116)
    knobs, inputs = knob_entries(method.knobs), getattr(method, "inputs", False)
    return MethodEntry(method.name, tuple(method.aliases), description, method.paper, knobs, inputs=inputs)


def _described_repair(kind: Any) -> MethodEntry:
    from suture.core.knobs import Knobs
    from suture.pipeline.repairs import RepairOptions

    knobs = knob_entries(kind.knobs) | knob_entries(Knobs(kind.name, RepairOptions))
    own = {name: knob for name, knob in knobs.items() if name != "seed"}  # it is the run's
    shared = _docstring(RepairOptions).partition("\n\n")[2]
    return MethodEntry(
        kind.name, (), f"{_docstring(kind.function)}\n\n{shared}", kind.paper, own, "repair", inputs=True
    )


def _docstring(function: Any) -> str:
    import inspect

    return (inspect.getdoc(function) or "").partition(">>>")[0].strip()


def knob_entries(knobs: "Knobs") -> dict[str, KnobEntry]:
    """Every knob with its default, range and values."""
    from suture.cli.ranges import named_values, ranges

    allowed, defaults = ranges(knobs), _plain(knobs.defaults)
    return {
        name: KnobEntry(defaults[name], allowed[name], named_values(annotation))
        for name, annotation in knobs.annotations.items()
    }


def _analysis_keys() -> dict[str, KeyEntry]:
    from suture.analysis import analysis_kinds

    keys: dict[str, KeyEntry] = {}
    for kind in analysis_kinds().values():
        for name, explanation in kind.keys.items():
            default: Any = kind.defaults[name]
            typed = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
            users = (*keys[name].analyses, kind.name) if name in keys else (kind.name,)
            keys[name] = KeyEntry(users, explanation, typed)
    return keys


def _choices() -> dict[str, tuple[str, ...]]:
    from suture.core.fabric import LOGGERS, PRECISIONS
    from suture.core.samplers import KINDS
    from suture.file_merge.options import DTYPES, VOCABULARY
    from suture.pipeline.searching import SCORES
    from suture.tasks.base import SPLITS

    return {
        "sampler": tuple(KINDS),
        "score": tuple(SCORES),
        "split": tuple(SPLITS),
        "fabric.precision": tuple(PRECISIONS),
        "fabric.loggers.kind": tuple(LOGGERS),
        "dtype": DTYPES,
        "vocabulary": VOCABULARY,
    }


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    return json.loads(json.dumps(dict(values)))


def write() -> None:
    """Write `catalogue.json` from the code."""
    FILE.write_text(json.dumps(asdict(described()), indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    write()
