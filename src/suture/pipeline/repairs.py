"""A repair as `surgery=final`, `deep`, `blend` or `online` runs it: on a merged model of a pool, with its task pool."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from suture.checkpoints import content_hash
from suture.core.batches import take
from suture.core.knobs import Knobs
from suture.core.progress import bar
from suture.core.random import generator_for
from suture.errors import ConfigError, unknown_name
from suture.evaluation import Row, TaskInputs, correct_answers
from suture.pipeline.context import Stage
from suture.repairs.model import SurgeryModel
from suture.repairs.modules import SurgeryModules
from suture.repairs.online import OnlineResult, online
from suture.repairs.problem import Problem
from suture.repairs.repair import SURGERIES
from suture.repairs.representation import Representation, representation
from suture.repairs.results import SurgeryResult
from suture.repairs.router import fit_router

Right = Mapping[str, Tensor]  # task → which of its test inputs are answered rightly
Encoded = Callable[[str], Tensor]  # task → the merged model's features of its test inputs
KINDS: dict[str, Any] = {**SURGERIES, "online": online}


@dataclass(frozen=True)
class Repaired:
    """What a repair did: its result, rows of the table, step → mean accuracy, and how representations moved."""

    kind: str
    result: SurgeryResult | OnlineResult
    rows: list[Row]
    scores: Mapping[int, float] = field(default_factory=dict)
    representation: Representation | None = None

    def save(self, path: Path) -> None:
        """Write the modules, kilobytes; a blend has none of its own."""
        models = self.result.models if isinstance(self.result, OnlineResult) else {1.0: self.result.model}
        last = models[max(models)]
        if isinstance(last, SurgeryModel):
            last.save(path)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a repair learns from and is looked at with, whatever its kind.

    `num_inputs` unlabelled inputs of each task's `split` are used, all by default. `router` finds tasks without their
    names. The final kind is scored every `eval_iterations` steps, if any. Representations are compared on `compare`
    inputs of each task. States of loops, and encodings with `keep_encodings`, are under `cache_dir`.
    """

    split: Literal["test", "train"] = "test"
    num_inputs: Annotated[int, Ge(1)] | None = None
    router: Literal["none", "centroids", "linear"] = "linear"
    eval_iterations: Annotated[int, Ge(0)] = 0
    compare: Annotated[int, Ge(0)] = 256
    keep_encodings: bool = False
    cache_dir: str = "outputs"


@dataclass(frozen=True)
class Repair:
    """One kind of repair with its knobs checked. `row` is its row in the table, by default after the merge's."""

    kind: str
    knobs: Mapping[str, Any]
    calibration: Calibration
    row: str = ""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Repair | None":
        """Read `surgery.*`; None for `surgery=none`. Raises `ConfigError` for a value that does not fit."""
        told = dict(config)
        kind = told.pop("kind")
        if kind == "none":
            return None
        if kind not in KINDS:
            raise ConfigError(unknown_name("surgery", kind, ["none", *KINDS]))
        shared = Knobs(f"surgery={kind}", Calibration, "surgery")
        own = {name: told.pop(name) for name in list(told) if name not in shared.defaults}
        checked, calibration = Knobs(f"surgery={kind}", KINDS[kind], "surgery").validate(own), shared.validate(told)
        if calibration["eval_iterations"] and kind != "final":
            found = f"surgery.eval_iterations={calibration['eval_iterations']}"
            raise ConfigError(f"{found}: only surgery=final is scored on the way, not {kind}. Remedy: leave it out.")
        return cls(kind, checked, Calibration(**calibration))

    @staticmethod
    def defaults(kind: str) -> dict[str, Any]:
        """Every key of a kind with its default, as its configuration has them."""
        own = {} if kind == "none" else Knobs(kind, KINDS[kind]).defaults | Knobs(kind, Calibration).defaults
        return {"kind": kind} | {name: value for name, value in own.items() if name != "seed"}

    def problems(self, stage: Stage) -> list[str]:
        """What would end the repair later on, one line each."""
        return stage.unmatched_tasks()

    def run(self, stage: Stage, label: str, merged: Mapping[str, Tensor], encodings: Path) -> Repaired:
        """Repair one merged model and score it; `label` is its row's name, `encodings` a folder for what is encoded."""
        device, forward = stage.one_device.device, stage.one_device.call
        module: Any = stage.build()
        module = module.load(merged).to(device).eval()
        expert = partial(_expert, stage, stage.build().to(device).eval())
        inputs = {name: self._chosen(task, stage.seed) for name, task in stage.inputs(self.calibration.split).items()}
        name = self.row or f"{label} + {self.kind}"
        kept = Path(self.calibration.cache_dir) / "encodings" if self.calibration.keep_encodings else encodings
        problem = Problem(module, expert, inputs, forward, kept, encode_batch=stage.batch_size, track=bar)
        with stage.profile(f"repair: {self.kind}"):
            if self.kind == "online":
                return self._online(stage, name, problem)
            return self._offline(stage, name, problem, merged)

    def _offline(self, stage: Stage, name: str, problem: Problem, merged: Mapping[str, Tensor]) -> Repaired:
        test, scores = stage.inputs("test"), {}
        work = {"merged": content_hash(merged), "kind": self.kind, "calibration": str(self.calibration)}
        knobs = {**self.knobs, "seed": stage.seed, "steps": stage.shortened(self.knobs["steps"])}
        resume = stage.resume(self.calibration.cache_dir, {**work, **{k: str(v) for k, v in knobs.items()}})
        encoded = cache(lambda task: problem.merged_rows(task, test[task].inputs))  # once, however often it is scored
        right_of = lambda model: {task: _right(problem, model, task, data, encoded) for task, data in test.items()}
        look = self._look(problem, right_of, scores)
        with stage.watch(name, knobs["steps"], resume) as watch:

            def on_step(step: int, losses: Tensor, modules: Mapping[str, SurgeryModules]) -> None:
                watch(step, losses.nansum().item(), None)
                look(step, modules)

            problem = replace(problem, resume=resume, on_step=on_step)
            result = SURGERIES[self.kind](problem, **knobs)
        right = right_of(result.model)
        rows = [_row(name, right), *self._routed(stage, name, problem, result.model, right, encoded)]
        compared = self._compare(problem, result.model, test)
        return Repaired(self.kind, result, rows, scores, compared)

    def _online(self, stage: Stage, name: str, problem: Problem) -> Repaired:
        test, learned = stage.inputs("test"), stage.inputs(self.calibration.split)
        result = online(problem, **{**self.knobs, "seed": stage.seed})
        encoded = cache(lambda task: problem.merged_rows(task, test[task].inputs))
        right = lambda model: {task: _right(problem, model, task, data, encoded) for task, data in test.items()}
        rows = [_row(f"{name} {share:.0%}", right(model)) for share, model in result.models.items()]
        seen = {}
        for task, outputs in result.outputs.items():
            data = learned[task]
            labels = data.labels[self._picked(data, stage.seed)][result.order[task]]
            seen[task] = data.logits(outputs).argmax(-1) == labels
        return Repaired(self.kind, result, [*rows, _row(f"{name} prequential", seen)])

    def _look(self, problem: Problem, right_of: Callable[[SurgeryModel], Right], scores: dict[int, float]):
        """Note the mean accuracy now and then, from cached encodings."""
        every = self.calibration.eval_iterations

        def look(step: int, modules: Mapping[str, SurgeryModules]) -> None:
            if every and (step + 1) % every == 0:
                kept = {place: module.copied() for place, module in modules.items()}
                model = SurgeryModel(problem.module, kept, problem.tasks, forward=problem.forward)
                scores[step + 1] = _row("", right_of(model)).mean

        return look

    def _routed(self, stage, name: str, problem: Problem, model, right: Right, encoded: Encoded) -> list[Row]:
        """The row without a task's name: an answer counts where the router found the task and the model the class."""
        if self.calibration.router == "none" or not isinstance(model, SurgeryModel):
            return []
        features = {task: problem.merged_rows(task, inputs) for task, inputs in problem.inputs.items()}
        model.router = fit_router(features, kind=self.calibration.router, seed=stage.seed)
        found = {task: model.router(encoded(task)) for task in right}
        model.router.to(problem.device)
        both = {task: right[task] & (found[task] == i) for i, task in enumerate(problem.tasks)}
        return [_row(f"{name}, routed", both)]

    def _compare(self, problem: Problem, model: nn.Module, test: Mapping[str, TaskInputs]) -> Representation | None:
        if not self.calibration.compare or not isinstance(model, SurgeryModel):
            return None
        few = {task: data.first(self.calibration.compare).inputs for task, data in test.items()}
        return representation(model, problem.experts, few, track=bar)

    def _chosen(self, task: TaskInputs, seed: int) -> Any:
        picked = self._picked(task, seed)
        return task.inputs if len(picked) == len(task) else take(task.inputs, picked)

    def _picked(self, task: TaskInputs, seed: int) -> Tensor:
        """Which inputs are learned from: the first of a random order, so that more of them include fewer."""
        count = min(self.calibration.num_inputs or len(task), len(task))
        if count == len(task):
            return torch.arange(count)
        return torch.randperm(len(task), generator=generator_for(seed, f"{task.name}/calibration"))[:count]


def _expert(stage: Stage, module: Any, task: str) -> nn.Module:
    return module.load(stage.vectors.models[task])


def _right(problem: Problem, model: nn.Module, task: str, data: TaskInputs, encoded: Encoded) -> Tensor:
    """Which of a task's test inputs are answered rightly; modules on the final feature take it from the cache."""
    if isinstance(model, SurgeryModel) and not model.network.blocks:
        final = lambda rows: model.repair(rows.to(problem.device), task)
        return correct_answers(final, replace(data, inputs=encoded(task)))
    plain = model.for_task(task) if isinstance(model, SurgeryModel) else partial(model, task=task)
    return correct_answers(plain, data, forward=lambda model, inputs: model(inputs))


def _row(name: str, right: Right) -> Row:
    return Row(name, {t: r.double().mean().item() for t, r in right.items()}, {t: len(r) for t, r in right.items()})
