"""Repairs for `repair=…`: fitted to a merged model of a pool, on the inputs of its task pool."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from suture.checkpoints import content_hash
from suture.core.knobs import Knobs
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
    SurgeryModel,
    SurgeryModules,
    fit_router,
    repair_kinds,
    representation,
)

NONE = "none"


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

    def positions(self, task: TaskInputs, seed: int) -> Tensor:
        """The positions of the inputs to learn from, in a seeded order: fewer are a subset of more."""
        count = min(self.num_inputs or len(task), len(task))
        if count == len(task):
            return torch.arange(count)
        return torch.randperm(len(task), generator=generator_for(seed, f"{task.name}/calibration"))[:count]


@dataclass(frozen=True)
class Repair:
    """One kind of repair with checked knobs. `row` names its row in the table, by default after the merge and kind."""

    kind: RepairKind
    knobs: Mapping[str, Any]
    options: RepairOptions
    row: str = ""

    @classmethod
    def of(cls, kind: str, values: Mapping[str, Any], row: str = "") -> "Repair":
        """A repair from the kind's knobs and those of `RepairOptions`; raises `ConfigError` for an invalid one."""
        kinds = repair_kinds()
        if kind not in kinds:
            raise ConfigError(unknown_name("repair", kind, [NONE, *kinds]))
        chosen, shared = kinds[kind], _shared(kind)
        own = {name: value for name, value in values.items() if name not in shared.defaults}
        knobs = chosen.knobs.validate(own)
        options = shared.validate({name: value for name, value in values.items() if name in shared.defaults})
        if options["eval_iterations"] and not chosen.scored_while_fitting:
            setting = f"repair.eval_iterations={options['eval_iterations']}"
            raise ConfigError(f"{setting}: only repair=final is scored on the way, not {kind}. Remedy: leave it out.")
        return cls(chosen, knobs, RepairOptions(**options), row)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Repair | None":
        """The repair of the keys `repair.*`, or None for `repair=none`; raises `ConfigError` for an invalid value."""
        values = dict(config)
        kind = values.pop("kind")
        return None if kind == NONE else cls.of(kind, values)

    @staticmethod
    def defaults(kind: str) -> dict[str, Any]:
        """Every configuration key of a kind with its default."""
        own = {} if kind == NONE else repair_kinds()[kind].knobs.defaults | _shared(kind).defaults
        return {"kind": kind} | {name: value for name, value in own.items() if name != "seed"}

    def name(self, label: str) -> str:
        """The name of the row of this repair of the merge `label`."""
        return self.row or f"{label} + {self.kind.name}"


def fit(repair: Repair, models: Models, merged: MergeResult, inputs: SplitInputs, context: Context) -> RepairResult:
    """Fit a repair to one merged model, with a router and a comparison of representations if its options say so."""
    options, device = repair.options, context.device
    module = models.new_encoder(device.device).load(merged.tensors)
    expert = partial(_expert, models, models.new_encoder(device.device))
    tasks = {name: inputs[options.split][name] for name in models.experts}
    chosen = {name: options.positions(task, context.seed) for name, task in tasks.items()}
    few = {name: tasks[name].inputs_at(positions) for name, positions in chosen.items()}
    encodings = Path(options.cache_dir) / "encodings" if options.keep_encodings else context.encodings
    problem = Problem(module, expert, few, device.call, encodings, encode_batch=context.batch_size, track=bar)
    with context.profile(f"repair: {repair.kind.name}"):
        result = _fitted(repair, problem, merged, inputs, context, encodings)
        if result.stream is not None:
            order = {name: chosen[name][at] for name, at in result.stream.order.items()}
            result = replace(result, stream=result.stream._replace(order=order))
        if isinstance(result.model, SurgeryModel) and result.stream is None:
            _add_router(result.model, problem, options, context.seed)
            compared = {name: inputs["test"][name].first(options.compare).inputs for name in models.experts}
            distances = representation(result.model, expert, compared, track=bar) if options.compare else None
            result = replace(result, representation=distances)
    return replace(result, name=repair.name(merged.label), split=options.split, encodings=encodings)


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
    knobs = {**repair.knobs, "seed": context.seed}
    with ExitStack() as stack:
        scores: dict[int, float] = {}
        if "steps" in knobs:
            knobs["steps"] = context.shortened(knobs["steps"])
            work = {"merged": content_hash(merged.tensors), "kind": kind.name, "options": str(options)}
            resume = context.resume(options.cache_dir, work | {key: str(value) for key, value in knobs.items()})
            watch = stack.enter_context(context.watch(repair.name(merged.label), knobs["steps"], resume))

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


def _add_router(model: Any, problem: Problem, options: RepairOptions, seed: int) -> None:
    if options.router != NONE:
        features = {task: problem.merged_rows(task, inputs) for task, inputs in problem.inputs.items()}
        model.router = fit_router(features, kind=options.router, seed=seed).to(problem.device)


def _shared(kind: str) -> Knobs:
    return Knobs(f"repair={kind}", RepairOptions, "repair")


def _expert(models: Models, module: Any, task: str) -> nn.Module:
    return module.load(models.experts[task])
