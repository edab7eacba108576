"""The fits of repairs to a merged model of a pool, on the inputs of its task pool."""

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from torch import Tensor

from suture.checkpoints import content_hash, open_checkpoint
from suture.core.batches import Inputs
from suture.core.machine import Meter
from suture.core.progress import bar
from suture.evaluation import SplitInputs
from suture.pipeline.context import Context
from suture.pipeline.models import Models
from suture.pipeline.repairs import NONE, Repair, RepairOptions
from suture.pipeline.results import MergeResult
from suture.pipeline.scoring import repair_rows
from suture.repairs import (
    Problem,
    RepairResult,
    Representation,
    StaticModel,
    SurgeryModel,
    SurgeryModules,
    add_router,
    get_repair_kind,
    representation,
)
from suture.repairs.problem import READ_EVERY


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
    options, before = repair.options, context.seconds_before
    chosen, few = options.select(inputs, models.experts, context.seed)
    work = partial(_fit_here, repair, models, merged, inputs, few)
    with context.profile(f"repair: {repair.kind.name}"):
        if context.sharded:
            result = _taken_over(context.together(lambda own: _handed_over(work(own), own)), models, merged, context)
        else:
            result = work(context)
        seconds = merged.seconds + result.seconds + context.seconds_before - before
        cost = {"seconds": seconds, "memory": _most(merged.memory, result.memory)}
        if result.stream is not None:
            order = {name: chosen[name][at] for name, at in result.stream.order.items()}
            result = replace(result, stream=result.stream._replace(order=order))
        result = replace(result, representation=_compared(result, models, merged, inputs, options, context))
    facts: dict[str, Any] = {"name": repair.name(merged.label), "chain": repair.chain, "split": options.split}
    facts |= {"inputs": sum(map(len, chosen.values()))} | cost
    return replace(result, **facts, encodings=_encodings(options, context))


def _fit_here(
    repair: Repair,
    models: Models,
    merged: MergeResult,
    inputs: SplitInputs,
    few: Mapping[str, Inputs],
    context: Context,
) -> RepairResult:
    """Fit one repair, with its cost, and then its router, in this process or in each of a group."""
    device, options = context.device, repair.options
    load, load_expert = (models.loader(device, unread=context.sharded) for _ in range(2))
    free = models.base.select({name: name for name in models.vectors().names})
    sizes = {"encode_batch": context.sizes, "track": context.track, "base": free, "devices": context.replicas}
    expert = lambda task: load_expert(models.experts[task])
    if repair.kind.static and models.can_be_unread:
        unread = models.loader(context.device, unread=True)
        sizes["unread"] = lambda task: unread(models.experts[task])
    encodings = _encodings(options, context)
    problem = Problem(load(merged.tensors), expert, few, device.call, encodings, fabric=context.group, **sizes)
    meter = Meter()
    result = _fitted(repair, problem, merged, inputs, context, encodings)
    result = replace(result, seconds=meter.seconds, memory=meter.memory)
    if options.router != NONE and isinstance(result.model, SurgeryModel) and result.stream is None:
        add_router(result.model, problem, options.router, context.seed)
    return result


def _encodings(options: RepairOptions, context: Context) -> Path | None:
    return Path(options.cache_dir) / "encodings" if options.keep_encodings else context.encodings


def _compared(
    result: RepairResult,
    models: Models,
    merged: MergeResult,
    inputs: SplitInputs,
    options: RepairOptions,
    context: Context,
) -> Representation | None:
    """The representations before and after the repair, beside the experts'; not where weights are split."""
    if not options.compare or context.sharded or result.stream is not None:
        return None
    if not isinstance(result.model, SurgeryModel | StaticModel):
        return None
    device = context.device
    load, load_expert = (models.loader(device) for _ in range(2))
    few = {name: inputs["test"][name].first(options.compare).inputs for name in models.experts}
    sides: dict[str, Any] = {"merged": load(merged.tensors), "forward": device.call, "track": bar}
    return representation(result.model, lambda task: load_expert(models.experts[task]), few, **sides)


def _handed_over(result: RepairResult, context: Context) -> tuple[dict[str, Any], Path]:
    """The fields of a result but its model, which the first process of a group saves in a file."""
    assert context.encodings is not None
    assert isinstance(result.model, SurgeryModel | StaticModel)
    context.encodings.mkdir(parents=True, exist_ok=True)
    path = context.encodings / f"{result.kind}-{uuid4().hex}.safetensors"
    if context.first:
        result.model.save(path)
    return {each.name: getattr(result, each.name) for each in fields(result) if each.name != "model"}, path


def _taken_over(
    handed: tuple[dict[str, Any], Path], models: Models, merged: MergeResult, context: Context
) -> RepairResult:
    """The result with its model again, whose weights are read when they are needed."""
    facts, path = handed
    load, forward = models.loader(context.device, unread=True), context.device.call
    if get_repair_kind(facts["kind"]).static:
        tasks = tuple(models.experts)
        model: Any = StaticModel(load(open_checkpoint(path)), tasks, forward=forward, kind=facts["kind"])
    else:
        model = SurgeryModel.load(path, load(merged.tensors), forward=forward)
    return RepairResult(model=model, **facts)


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
            watch = stack.enter_context(context.watch(name, steps, resume, quiet=not context.first))

            def on_step(step: int, losses: Tensor, modules: Mapping[str, SurgeryModules]) -> None:
                watch(step, losses.nansum().item(), None)
                if options.eval_iterations and (step + 1) % options.eval_iterations == 0:
                    copies = {layer: module.copied() for layer, module in modules.items()}
                    model = SurgeryModel(problem.module, copies, problem.tasks, forward=problem.forward)
                    live = RepairResult(kind.name, model, losses[None], encodings=encodings)
                    scores[step + 1] = repair_rows(live, merged.label, problem.tasks, inputs, context)[0].mean

            every = math.gcd(options.eval_iterations, READ_EVERY)  # no block of steps reaches over a score
            problem = replace(problem, resume=resume, on_step=on_step, look_every=every, profile=context.profile)
        result = kind.function(problem, **knobs)
    return replace(result, scores=scores)
