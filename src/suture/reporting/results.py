"""Reports on results of suture's functions: merged weights, adaptations, repairs, modules of any kind."""

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from suture.adaptation import AdaMergingResult
from suture.checkpoints import Source, open_checkpoint, provenance_of
from suture.core.progress import Profile, bar
from suture.errors import PRETRAINED, ConfigError
from suture.evaluation import Role, Row, Scorer, TaskInputs
from suture.families import Encoder
from suture.repairs import RepairResult, SurgeryModel, representation
from suture.reporting.data import Report

_SCORER = Scorer(track=bar)
#: A row of accuracies, an adaptation, a repair, weights of any kind, or any function from inputs to logits.
Result = Row | AdaMergingResult | RepairResult | Source | Callable[[Tensor], Tensor]
Weights = str | os.PathLike | nn.Module | Mapping  # anything that can be opened as a checkpoint
COMPARED = 256  # inputs of each task on which representations are compared


@dataclass(frozen=True)
class Scoring:
    """The tasks to score results on, the models to compare with, and the module to load weights into."""

    tasks: Mapping[str, TaskInputs]
    module: nn.Module | None = None
    pretrained: Source | None = None
    experts: Mapping[str, Source] | None = None

    def __post_init__(self):
        if not self.tasks:
            raise ConfigError("There is nothing to score the results on. Remedy: give tasks={name: TaskInputs(…)}.")
        missing = [task for task in self.tasks if self.experts and task not in self.experts]
        if missing:
            raise ConfigError(f"experts lacks {missing[0]!r}; wanted a model for each of {', '.join(self.tasks)}.")

    def report(self, results: Mapping[str, Result], title: str) -> Report:
        """Score every result and collect its report."""
        profile = Profile()
        with profile("evaluation"):
            base = None if self.pretrained is None else self._row("pretrained", self.pretrained, role="pretrained")
            experts = _SCORER.experts(self.teachers.__getitem__, self.tasks) if self.experts else None
            rows = [row for row in (base, experts) if row is not None]
            rows += [self._row(name, result) for name, result in results.items()]
        with profile("comparing representations"):
            repairs = {name: self._compared(r) for name, r in results.items() if isinstance(r, RepairResult)}
        return Report(
            title or _title(results, self.tasks),
            rows,
            base,
            experts,
            provenance=self._provenance(),
            profile=profile.seconds,
            learning={name: result for name, result in results.items() if isinstance(result, AdaMergingResult)},
            repairs=repairs,
        )

    @cached_property
    def teachers(self) -> dict[str, nn.Module]:
        """The experts as modules."""
        return {task: self._loaded(source) for task, source in (self.experts or {}).items()}

    def _row(self, name: str, result: Result, role: Role = "merge") -> Row:
        if isinstance(result, Row):
            return replace(result, name=name)
        row = Row(name, {}, role=role)
        if isinstance(result, RepairResult):
            facts = {"needs_task": result.tensors is None, "learned": result.learned}
            row = replace(row, role="repair", repair=result.kind, **facts)
        return _SCORER.row(row, self._model(result), self.tasks)

    def _model(self, result: Any) -> Any:
        """The model to score, or a mapping task → model."""
        if isinstance(result, RepairResult):
            return {task: result.model.for_task(task) for task in self.tasks}
        if isinstance(result, AdaMergingResult):
            return self._loaded(result.merged)
        return self._loaded(result) if isinstance(result, Weights) else result

    def _loaded(self, source: Source) -> nn.Module:
        """A module unchanged, or weights of any kind in a copy of `module`."""
        if isinstance(source, nn.Module):
            return source
        if self.module is None:
            raise ConfigError("There are weights, but no module to load them into. Remedy: give module=.")
        module, weights = copy.deepcopy(self.module), dict(open_checkpoint(source))
        if isinstance(module, Encoder):
            return module.load(weights)
        module.load_state_dict(weights)
        return module

    def _compared(self, result: RepairResult) -> RepairResult:
        model = result.model
        if not isinstance(model, SurgeryModel) or not self.experts:
            return result
        few = {task: data.first(COMPARED).inputs for task, data in self.tasks.items() if task in model.tasks}
        return replace(result, representation=representation(model, self.teachers, few, track=bar))

    def _provenance(self) -> dict[str, Any]:
        sources = {PRETRAINED: self.pretrained, **(self.experts or {})}
        return provenance_of({name: open_checkpoint(source) for name, source in sources.items() if source is not None})


def _title(results: Mapping[str, Result], tasks: Mapping[str, TaskInputs]) -> str:
    names = ", ".join(results) if len(results) < 3 else f"{len(results)} results"
    return f"{names} on {len(tasks)} task{'s' * (len(tasks) > 1)}"
