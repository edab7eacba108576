"""Repairs for `repair=…`: fitted to a merged model of a pool, on the inputs of its task pool."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from suture.core.batches import Inputs
from suture.core.knobs import Knobs
from suture.core.random import generator_for
from suture.errors import ConfigError, unknown_name
from suture.evaluation import SplitInputs, TaskInputs
from suture.repairs import (
    RepairKind,
    repair_kinds,
)

NONE = "none"
JOIN = "+"  # between the kinds of a chain


@dataclass(frozen=True, kw_only=True)
class RepairOptions:
    """Options of all kinds of repair.

    `num_inputs` unlabelled inputs of each task's `split` are used, by default all. `router` chooses tasks that are not
    named. The final kind is scored every `eval_iterations` steps, unless that is 0. Representations are compared on
    `compare` inputs of each task. States of loops, and with `keep_encodings` also encodings, are below `cache_dir`.
    """

    split: Literal["test", "train"] = "test"
    num_inputs: Annotated[int, Ge(1)] | None = None
    router: Literal["none", "centroids", "linear"] = "linear"
    eval_iterations: Annotated[int, Ge(0)] = 0
    compare: Annotated[int, Ge(0)] = 256
    keep_encodings: bool = False
    cache_dir: str = "outputs"

    def select(
        self, inputs: SplitInputs, tasks: Iterable[str], seed: int
    ) -> tuple[dict[str, Tensor], dict[str, Inputs]]:
        """The positions of the inputs to learn from, and these inputs, by task."""
        chosen = {name: self.positions(inputs[self.split][name], seed) for name in tasks}
        return chosen, {name: inputs[self.split][name].inputs_at(at) for name, at in chosen.items()}

    def positions(self, task: TaskInputs, seed: int) -> Tensor:
        """The positions of the inputs to learn from, in a seeded order: fewer are a subset of more."""
        count = min(self.num_inputs or len(task), len(task))
        if count == len(task):
            return torch.arange(count)
        return torch.randperm(len(task), generator=generator_for(seed, f"{task.name}/calibration"))[:count]


@dataclass(frozen=True)
class Repair:
    """One kind of repair with checked knobs, of the merged model or of the model that the repair `after` leaves.

    `row` names its row in the table, by default after the merge and the kinds.
    """

    kind: RepairKind
    knobs: Mapping[str, Any]
    options: RepairOptions
    row: str = ""
    after: "Repair | None" = None

    @classmethod
    def of(cls, kind: str, values: Mapping[str, Any], row: str = "") -> "Repair":
        """A repair from the kind's knobs and those of `RepairOptions`; raises `ConfigError` for an invalid one."""
        chosen, shared = _kind(kind), _shared(kind)
        own = {name: value for name, value in values.items() if name not in shared.defaults}
        knobs = chosen.knobs.validate(own)
        options = shared.validate({name: value for name, value in values.items() if name in shared.defaults})
        if options["eval_iterations"] and not chosen.scored_while_fitting:
            setting = f"repair.eval_iterations={options['eval_iterations']}"
            raise ConfigError(f"{setting}: only repair=final is scored on the way, not {kind}. Remedy: leave it out.")
        return cls(chosen, knobs, RepairOptions(**options), row)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Repair | None":
        """The repair of the keys `repair.*`, or None for `repair=none`; raises `ConfigError` for an invalid value.

        For a chain, such as kind=calibrate+final, the keys are `repair.calibrate.*` and `repair.final.*`.
        """
        values = dict(config)
        kinds = values.pop("kind").split(JOIN)
        if kinds == [NONE]:
            return None
        last: Repair | None = None
        for kind in kinds:
            own = cls.of(kind, values if len(kinds) == 1 else values[kind])
            if last is not None and not last.kind.static:
                static = ", ".join(name for name, each in repair_kinds().items() if each.static)
                raise ConfigError(
                    f"repair={JOIN.join(kinds)}: nothing can follow {last.kind.name}, which adds modules. "
                    f"Remedy: begin with the kinds that change weights: {static}."
                )
            last = replace(own, after=last)
        return last

    @classmethod
    def defaults(cls, kind: str) -> dict[str, Any]:
        """Every configuration key of a kind, or of a chain of kinds, with its default."""
        kinds = kind.split(JOIN)
        if len(kinds) > 1:
            if repeated := [name for name in kinds if kinds.count(name) > 1]:
                raise ConfigError(f"repair={kind}: {repeated[0]} stands there twice. Remedy: name each kind once.")
            return {"kind": kind} | {each: cls._keys(each) for each in kinds}
        return {"kind": kind} | ({} if kind == NONE else cls._keys(kind))

    @staticmethod
    def _keys(kind: str) -> dict[str, Any]:
        own = _kind(kind).knobs.defaults | _shared(kind).defaults
        return {name: value for name, value in own.items() if name != "seed"}

    @property
    def chain(self) -> tuple[str, ...]:
        """The kinds that are fitted one after another, this one last."""
        return tuple(each.kind.name for each in self.all)

    @property
    def all(self) -> "tuple[Repair, ...]":
        """The repairs that are fitted one after another, this one last."""
        return (*(self.after.all if self.after else ()), self)

    def name(self, label: str) -> str:
        """The name of the row of this repair of the merge `label`."""
        return self.row or " + ".join((label, *self.chain))


def _kind(name: str) -> RepairKind:
    """The kind of this name; none is no kind, but what one may type."""
    if name not in (kinds := repair_kinds()):
        raise ConfigError(unknown_name("repair", name, [NONE, *kinds]))
    return kinds[name]


def _shared(kind: str) -> Knobs:
    return Knobs(f"repair={kind}", RepairOptions, "repair")
