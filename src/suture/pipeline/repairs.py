"""Repairs for `repair=…`: fitted to a merged model of a pool, on the inputs of its task pool."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from suture.checkpoints import content_hash
from suture.core.batches import Inputs
from suture.core.knobs import Knobs
from suture.core.machine import Meter
from suture.core.progress import bar
from suture.core.random import generator_for
from suture.errors import ConfigError, unknown_name
from suture.evaluation import SplitInputs, TaskInputs
from suture.pipeline.context import Context
from suture.pipeline.models import Models
from suture.pipeline.results import MergeResult
from suture.pipeline.scoring import repair_rows
from suture.repairs import (
    Problem,
    RepairKind,
    RepairResult,
    StaticModel,
    SurgeryModel,
    SurgeryModules,
    add_router,
    repair_kinds,
    representation,
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
        return (*(self.after.chain if self.after else ()), self.kind.name)

    def name(self, label: str) -> str:
        """The name of the row of this repair of the merge `label`."""
        return self.row or " + ".join((label, *self.chain))


def fit(
    repair: Repair, models: Models, merged: MergeResult, inputs: SplitInputs, context: Context
) -> list[RepairResult]:
    """Fit a repair to one merged model, after those that it follows; returns their results in this order."""
    earlier = [] if repair.after is None else fit(repair.after, models, merged, inputs, context)
    start = merged
    if earlier:
        last = earlier[-1]
        start = replace(merged, tensors=_repaired_weights(merged, last), seconds=last.seconds, memory=last.memory)
    return [*earlier, _fit_one(repair, models, start, inputs, context)]


def _repaired_weights(merged: MergeResult, result: RepairResult) -> dict[str, Tensor]:
    """The merged model's tensors, those that a static repair has changed replaced."""
    assert result.tensors is not None
    return {**merged.tensors, **{name: t for name, t in result.tensors.items() if name in merged.tensors}}


def _fit_one(
    repair: Repair, models: Models, merged: MergeResult, inputs: SplitInputs, context: Context
) -> RepairResult:
    """Fit one repair, with a router and a comparison of representations if its options say so."""
    options, device = repair.options, context.device
    module = models.new_encoder(device.device).load(merged.tensors)
    expert = partial(_expert, models, models.new_encoder(device.device))
    chosen, few = options.select(inputs, models.experts, context.seed)
    encodings = Path(options.cache_dir) / "encodings" if options.keep_encodings else context.encodings
    free = models.base.select({name: name for name in models.vectors().names})
    sizes = {"encode_batch": context.batch_size, "track": bar, "base": free, "devices": device.replicas}
    problem, meter = Problem(module, expert, few, device.call, encodings, **sizes), Meter()
    before = context.seconds_before
    with context.profile(f"repair: {repair.kind.name}"):
        result = _fitted(repair, problem, merged, inputs, context, encodings)
        seconds = merged.seconds + meter.seconds + context.seconds_before - before
        cost = {"seconds": seconds, "memory": _most(merged.memory, meter.memory)}
        if result.stream is not None:
            order = {name: chosen[name][at] for name, at in result.stream.order.items()}
            result = replace(result, stream=result.stream._replace(order=order))
        if isinstance(result.model, SurgeryModel | StaticModel) and result.stream is None:
            if options.router != NONE and isinstance(result.model, SurgeryModel):
                add_router(result.model, problem, options.router, context.seed)
            compared = {name: inputs["test"][name].first(options.compare).inputs for name in models.experts}
            sides: dict[str, Any] = {"merged": module, "forward": device.call, "track": bar}
            distances = representation(result.model, expert, compared, **sides) if options.compare else None
            result = replace(result, representation=distances)
    facts: dict[str, Any] = {"name": repair.name(merged.label), "chain": repair.chain, "split": options.split}
    facts |= {"inputs": sum(map(len, chosen.values()))} | cost
    return replace(result, **facts, encodings=encodings)


def _most(*peaks: int | None) -> int | None:
    """The largest of some peaks; None if one is unknown."""
    return max(known) if len(known := [peak for peak in peaks if peak is not None]) == len(peaks) else None


def _fitted(
    repair: Repair,
    problem: Problem,
    merged: MergeResult,
    inputs: SplitInputs,
    context: Context,
    encodings: Path | None,
) -> RepairResult:
    """Fit the repair, with its loop resumed, logged, and scored every few steps."""
    kind, options = repair.kind, repair.options
    knobs = {**repair.knobs, **({"seed": context.seed} if "seed" in kind.knobs.defaults else {})}
    with ExitStack() as stack:
        scores: dict[int, float] = {}
        if "steps" in knobs:
            knobs["steps"] = context.shortened(knobs["steps"])
            work = {"merged": content_hash(merged.tensors), "kind": kind.name, "options": str(options)}
            work |= {key: str(value) for key, value in knobs.items()}
            name, steps = repair.name(merged.label), knobs["steps"]
            resume = context.resume(name, options.cache_dir, work, steps)
            watch = stack.enter_context(context.watch(name, steps, resume))

            def on_step(step: int, losses: Tensor, modules: Mapping[str, SurgeryModules]) -> None:
                watch(step, losses.nansum().item(), None)
                if options.eval_iterations and (step + 1) % options.eval_iterations == 0:
                    copies = {layer: module.copied() for layer, module in modules.items()}
                    model = SurgeryModel(problem.module, copies, problem.tasks, forward=problem.forward)
                    live = RepairResult(kind.name, model, losses[None], encodings=encodings)
                    scores[step + 1] = repair_rows(live, merged.label, problem.tasks, inputs, context)[0].mean

            problem = replace(problem, resume=resume, on_step=on_step)
        result = kind.function(problem, **knobs)
    return replace(result, scores=scores)


def _kind(name: str) -> RepairKind:
    """The kind of this name; none is no kind, but what one may type."""
    if name not in (kinds := repair_kinds()):
        raise ConfigError(unknown_name("repair", name, [NONE, *kinds]))
    return kinds[name]


def _shared(kind: str) -> Knobs:
    return Knobs(f"repair={kind}", RepairOptions, "repair")


def _expert(models: Models, module: Any, task: str) -> nn.Module:
    return module.load(models.experts[task])
