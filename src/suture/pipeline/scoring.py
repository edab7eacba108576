"""The rows of a run's accuracy table: pretrained model, experts, merges and their repairs, on the test split."""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from suture import __version__
from suture.checkpoints import Checkpoint
from suture.core.batch_sizes import AUTO
from suture.evaluation import Row, SplitInputs, TaskInputs
from suture.evaluation.accuracy import with_language_scores
from suture.pipeline.context import Context
from suture.pipeline.models import Models
from suture.pipeline.results import MergeResult
from suture.repairs import Problem, RepairResult
from suture.storage.cache import cache_directory, once

_COMPARED = 256  # inputs of a task that are looked for among those of another
_SAME = 1e-4  # relative distance of the features of one input, encoded in different batches
_IN_COMMON = 0.05  # a smaller share of common inputs is not worth a warning


@dataclass(frozen=True)
class Scores:
    """The rows of the table, and two of them: the pretrained model's, and the experts' (None if a task has none)."""

    rows: Sequence[Row] = ()
    pretrained: Row | None = None
    experts: Row | None = None


def score_references(models: Models, inputs: SplitInputs, context: Context, *, reuse: bool = False) -> Scores:
    """Score the pretrained model and the experts; with `reuse` once for all runs that share a cache."""
    test = inputs["test"]
    with context.profile("evaluation"):
        pretrained, experts = _references(models, test, context, reuse)
    return Scores([pretrained, *([experts] if experts else [])], pretrained, experts)


def score_merge(
    result: MergeResult, repairs: Sequence[RepairResult], models: Models, inputs: SplitInputs, context: Context
) -> list[Row]:
    """Score a merged model, then each of its repairs."""
    cost: dict[str, Any] = {"learned": result.how, "seconds": result.seconds, "memory": result.memory}
    row = Row(result.label, {}, merge=result.label, split=result.split, **cost)
    test = inputs["test"]  # decoded once, before processes are forked

    def rows(context: Context) -> list[Row]:
        load = models.loader(context.device, unread=context.sharded)
        rows = [context.scorer.row(row, load(result.tensors), test)]
        for repair in repairs:
            rows += repair_rows(repair, result.label, models.experts, inputs, context)
        return rows

    with context.profile("evaluation"):
        return context.together(rows)


def score_model(name: str, model: Checkpoint, models: Models, inputs: SplitInputs, context: Context) -> Row:
    """The row of one more model of the same architecture."""
    test = inputs["test"]

    def row(context: Context) -> Row:
        return context.scorer.row(name, models.loader(context.device, unread=context.sharded)(model), test)

    return context.together(row)


def expert_matrix(models: Models, inputs: SplitInputs, context: Context) -> list[Row]:
    """The rows of every fine-tuned model of the pool on every task."""
    test = inputs["test"]

    def rows(context: Context) -> list[Row]:
        load = models.loader(context.device, unread=context.sharded)
        return context.scorer.matrix(lambda task: load(models.experts[task]), test, models.experts)

    return context.together(rows)


def repair_rows(
    result: RepairResult, label: str, experts: Collection[str], inputs: SplitInputs, context: Context
) -> list[Row]:
    """The rows of one repair on the tasks of some experts: with the task given, and, with a router, also routed.

    An online repair has a row for each share of its stream, and a prequential one, from each input's output before its
    own step.
    """
    facts: dict[str, Any] = {"learned": result.learned, "split": result.split or ""}
    facts |= {"seconds": result.seconds, "memory": result.memory}
    facts |= {"needs_task": result.tensors is None, "added_parameters": result.added_parameters}
    row = Row(result.name, {}, role="repair", merge=label, repair="+".join(result.chain) or result.kind, **facts)
    test = {task: data for task, data in inputs["test"].items() if data.expert in experts}
    if any(task.requests is not None for task in test.values()):
        return [_language_row(row, result, test, context)]
    if result.stream is not None:
        stages = ((f"{result.name} {share:.0%}", model) for share, model in result.stages.items())
        rows = [_row(replace(row, name=name), _correct(result, model, test, context)) for name, model in stages]
        return [*rows, _row(replace(row, name=f"{result.name} prequential"), _prequential(result, inputs))]
    correct = _correct(result, result.model, test, context)
    rows = [_row(row, correct)]
    if result.model.router is not None:
        features = _features(result, result.model, test, context)
        experts = {task: data.expert for task, data in test.items()}
        rows.append(_routed_row(row, result, correct, features, experts))
    return rows


def _routed_row(
    row: Row,
    result: RepairResult,
    correct: Mapping[str, Tensor],
    features: Mapping[str, Tensor],
    experts: Mapping[str, str],
) -> Row:
    """The row with the router's choice of task, with the router's own accuracy and what speaks against it."""
    router: Any = result.model.router
    places = {task: result.model.tasks.index(expert) for task, expert in experts.items()}
    right = {name: _on_router(router, rows) == places[name] for name, rows in features.items()}
    shares = {name: hits.double().mean().item() for name, hits in right.items()}
    added = row.added_parameters + sum(tensor.numel() for tensor in router.buffers())
    facts: dict[str, Any] = {"routed": True, "needs_task": False, "learned": result.learned_for_routing}
    facts |= {
        "routing": shares,
        "added_parameters": added,
        "warnings": shared_inputs({task: features[task] for task in experts if experts[task] == task}),
    }
    named = replace(row, name=f"{result.name}, routed", **facts)
    return _row(named, {name: correct[name] & hits for name, hits in right.items()})


def shared_inputs(features: Mapping[str, Tensor]) -> tuple[str, ...]:
    """One line for each two tasks that have inputs in common, by their features, which no router can tell apart.

    `features`: task → (input, dim) of one model. Up to 256 inputs of a task are compared with all of another.
    """
    few = {name: rows[_spread(len(rows), _COMPARED)].double() for name, rows in features.items()}
    lines = []
    for one, other in combinations(features, 2):
        nearest = _distance_to_nearest(few[one], features[other])
        share = (nearest <= _SAME * few[one].norm(dim=1)).double().mean().item()
        if share > _IN_COMMON:
            lines.append(
                f"Tasks {one!r} and {other!r} share inputs ({share:.0%} of those compared): no router can tell them "
                "apart. Remedy: give the task's name."
            )
    return tuple(lines)


def _distance_to_nearest(few: Tensor, rows: Tensor) -> Tensor:
    """From each of a few features to the nearer of its two neighbours among `rows` along a fixed direction.

    The same input's feature, up to rounding, is one of these; a search of all pairs would take minutes for many tasks.
    """
    direction = torch.arange(rows.shape[1], dtype=torch.float64).cos()
    keys, order = (rows.double() @ direction).sort()
    after = torch.searchsorted(keys, few @ direction)
    neighbours = torch.stack([after - 1, after]).clamp(0, len(rows) - 1)
    return (rows[order[neighbours]].double() - few).norm(dim=-1).amin(0)


def _spread(length: int, most: int) -> Tensor:
    return torch.linspace(0, length - 1, min(length, most)).round().long()


def _on_router(router: Any, rows: Tensor) -> Tensor:
    return router(rows.to(next(router.buffers()).device)).cpu()


def _language_row(row: Row, result: RepairResult, test: Mapping[str, TaskInputs], context: Context) -> Row:
    """The row of a repaired language model, the task given; an online repair has its last stage's."""
    scores = {
        name: _plain(context).language(result.model.for_task(task.expert), task, row.name)
        for name, task in test.items()
    }
    return with_language_scores(row, scores, test)


def _references(
    models: Models, test: Mapping[str, TaskInputs], context: Context, reuse: bool
) -> tuple[Row, Row | None]:
    identities = {name: task.identity for name, task in test.items()}
    computation = (context.fabric, context.batch_size, torch.get_num_threads())
    key = str(
        (context.fingerprint, identities, models.pool, *computation, context.seed, __version__, torch.__version__)
    )
    score = lambda: context.together(partial(_score_references, models, test))
    if not reuse or None in identities.values():
        return score()
    path = cache_directory() / "references" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    rows = json.loads(once(path, lambda: json.dumps([_data(row) for row in score()])))
    pretrained, experts = (None if row is None else _from_data(row) for row in rows)
    assert pretrained is not None
    return pretrained, experts


def _data(row: Row | None) -> dict[str, Any] | None:
    return None if row is None else asdict(row)


def _from_data(data: dict[str, Any]) -> Row:
    details = {task: {name: tuple(pair) for name, pair in each.items()} for task, each in data["details"].items()}
    return Row(**{**data, "details": details})


def _score_references(models: Models, test: Mapping[str, TaskInputs], context: Context) -> tuple[Row, Row | None]:
    load = models.loader(context.device, unread=context.sharded)
    row = Row("pretrained", {}, role="pretrained")
    pretrained = context.scorer.row(row, load(models.base), test)
    names = {task: data.expert for task, data in test.items()}
    complete = set(names.values()) <= set(models.experts)
    experts = context.scorer.experts(lambda task: load(models.experts[names[task]]), test) if complete else None
    return pretrained, experts


def _correct(result: RepairResult, model: Any, test: Mapping[str, TaskInputs], context: Context) -> dict[str, Tensor]:
    """Whether each input is classified correctly, bool (N,) by task; final-feature modules use cached features."""
    if not model.features_suffice:
        return {name: _plain(context).correct(model.for_task(task.expert), task) for name, task in test.items()}
    features = _features(result, model, test, context)

    def repaired(rows: Tensor, *, task: str) -> Tensor:
        return model.repair(rows.to(model.network.device), task)

    alone = replace(_plain(context), fabric=None)  # features are there already
    return {
        name: alone.correct(partial(repaired, task=task.expert), replace(task, inputs=features[name]))
        for name, task in test.items()
    }


def _plain(context: Context) -> Any:
    """The run's scorer, for models that call the encoder themselves."""
    return replace(context.scorer, forward=_call_whole)


def _call_whole(model: Any, inputs: Any) -> Tensor:
    return model(inputs)


def _features(result: RepairResult, model: Any, test: Mapping[str, TaskInputs], context: Context) -> dict[str, Tensor]:
    """The merged model's features of all test inputs, encoded once in a run."""
    network, inputs = model.network, {name: task.inputs for name, task in test.items()}
    experts: dict[str, Any] = dict.fromkeys(inputs, network.module)
    sizes: dict[str, Any] = {"encode_batch": context.sizes} if context.batch_size == AUTO else {}
    sizes["fabric"] = context.group
    problem = Problem(network.module, experts, inputs, context.device.call, result.encodings, **sizes)
    return {name: problem.merged_rows(name, rows) for name, rows in inputs.items()}


def _prequential(result: RepairResult, inputs: SplitInputs) -> dict[str, Tensor]:
    correct = {}
    assert result.stream is not None
    for name, outputs in result.stream.outputs.items():
        task = inputs[result.split or "test"][name]
        correct[name] = task.logits(outputs).argmax(-1) == task.labels[result.stream.order[name]]
    return correct


def _row(row: Row, correct: Mapping[str, Tensor]) -> Row:
    accuracies = {task: hits.double().mean().item() for task, hits in correct.items()}
    return replace(row, accuracies=accuracies, samples={task: len(hits) for task, hits in correct.items()})
