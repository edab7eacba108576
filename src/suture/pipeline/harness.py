"""lm-evaluation-harness as a bridge: its tasks for base, experts, merge and repairs, in the same table.

https://github.com/EleutherAI/lm-evaluation-harness
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from suture.errors import ConfigError, SutureError, check_known, unknown_name
from suture.evaluation import Row
from suture.evaluation.metrics import metric
from suture.pipeline.context import Context
from suture.pipeline.models import Models
from suture.pipeline.results import Outcome
from suture.pipeline.saving import model_folders
from suture.pipeline.scoring import Scores

_FIRST = ("exact_match", "acc_norm", "acc", "bits_per_byte", "word_perplexity")
_BACKENDS = ("hf", "vllm")


@dataclass(frozen=True)
class Harness:
    """The keys `evaluate.*`: which harness, its tasks, and its settings, which are handed on as they are.

    `include_path` is a folder of task files of the harness's own format. `backend` is hf or vllm.
    """

    harness: str
    tasks: tuple[str, ...]
    include_path: str | None = None
    backend: str = "hf"
    num_fewshot: int | None = None
    limit: float | None = None
    batch_size: int | str = 8
    apply_chat_template: bool = False
    model_args: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None, family: str) -> "Harness | None":
        """Read `evaluate`; None where no harness is named. Raises `ConfigError` for what does not fit."""
        values = {key: value for key, value in (config or {}).items() if value is not None}
        check_known("key of evaluate", values, [each.name for each in fields(cls)])
        tasks = values.get("tasks") or []
        tasks = [tasks] if isinstance(tasks, str) else tasks
        if not values.get("harness"):
            if tasks:
                raise ConfigError("evaluate.tasks is given without a harness. Remedy: evaluate.harness=lm_eval.")
            return None
        check_known("harness", [values["harness"]], ["lm_eval"])
        if not tasks:
            raise ConfigError("evaluate.harness=lm_eval names no task. Remedy: evaluate.tasks=[…].")
        check_known("backend of evaluate", [values.get("backend", "hf")], _BACKENDS)
        if family != "causal_lm":
            raise ConfigError(f"evaluate.harness=lm_eval, but family={family}; wanted family: causal_lm.")
        return cls(**{**values, "tasks": tuple(map(str, tasks))})

    def problems(self) -> list[str]:
        """Reasons why the harness cannot run, one line each, before any work: it is not there, or a task is not."""
        if find_spec("lm_eval") is None:
            return ["evaluate.harness=lm_eval needs lm-evaluation-harness. Remedy: pip install 'suture[lm_eval]'."]
        if self.include_path is not None and not Path(self.include_path).is_dir():
            return [f"evaluate.include_path='{self.include_path}' is no folder. Remedy: name one with task files."]
        known = self._manager.all_tasks
        return [unknown_name("task of lm_eval", task, known) for task in self.tasks if task not in known]

    def evaluated(self, device: str, folder: Path, more: Mapping[str, str] | None = None) -> dict[str, Any]:
        """The harness's own results for a model's folder; `more` are further arguments of its model."""
        harness: Any = import_module("lm_eval")
        arguments = {"pretrained": str(folder), **(more or {}), **self.model_args}
        results = harness.simple_evaluate(
            model=self.backend,
            model_args=arguments,
            tasks=list(self.tasks),
            task_manager=self._manager,
            num_fewshot=self.num_fewshot,
            limit=self.limit,
            batch_size=self.batch_size,
            device=device,
            apply_chat_template=self.apply_chat_template,
            log_samples=False,
        )
        if results is None:
            raise SutureError("lm_eval returned no results. Remedy: run it on one process.")
        return results

    @cached_property
    def _manager(self) -> Any:
        """The index of all task files, which takes seconds to make."""
        from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]

        return TaskManager(include_path=self.include_path)


@dataclass(frozen=True)
class Measured:
    """The scores with the harness's added, the record of the harness for report.json, and notes."""

    scores: Scores
    record: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()


def measure(
    harness: Harness | None, models: Models, outcomes: Sequence[Outcome], scores: Scores, context: Context
) -> Measured:
    """Run the harness on every model with a folder of its own, and add its results to the rows; without one, nothing.

    The experts' row has the best expert of each task. Repairs that add modules beside the weights have no folder that
    the harness can load, and are left out with a note.
    """
    if harness is None:
        return Measured(scores)
    device = str(context.device.device)
    with context.profile("lm_eval"):
        results = {"pretrained": harness.evaluated(device, models.family.directory)}
        experts = {name: harness.evaluated(device, *_folder_of(models, name)) for name in models.experts}
        results |= {row: harness.evaluated(device, folder) for row, folder in model_folders(outcomes).items()}
    by_name = {row.name: row for row in scores.rows}
    rows = [by_name.get("pretrained", Row("pretrained", {}, role="pretrained"))]
    rows.append(by_name.get("experts", Row("experts", {}, role="experts", needs_task=True)))
    for result in (outcome.merged for outcome in outcomes):
        cost: dict[str, Any] = {"learned": result.how, "seconds": result.seconds, "memory": result.memory}
        plain = Row(result.label, {}, merge=result.label, **cost)
        rows.append(by_name.get(result.label, plain))
        rows += [row for row in scores.rows if row.role == "repair" and row.merge == result.label]
    kept = {task for row in rows for task in row.accuracies}
    filled = [_with_results(row, _of_row(row, results, experts), kept) for row in rows]
    outside = [row.name for row in rows if row.name not in results and row.role == "repair"]
    notes = tuple(
        f"lm_eval cannot load '{name}', which has modules beside its weights: not scored." for name in outside
    )
    record = _record(harness, {**results, **{f"expert {name}": each for name, each in experts.items()}})
    return Measured(Scores(filled, filled[0], filled[1]), record, notes)


def _folder_of(models: Models, name: str) -> tuple[Path, dict[str, str]]:
    """The folder of an expert, or the base's with an adapter's; the base's tokenizer, which is that of all."""
    source, base = models.experts[name].directory or Path(str(models.pool.models[name])), models.family.directory
    if (source / "adapter_config.json").is_file():
        return base, {"peft": str(source)}
    return source, {"tokenizer": str(base)}


def _of_row(row: Row, results: Mapping[str, Any], experts: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Task → metric → (value, error), of a model, or of the best expert of each task."""
    if row.role != "experts":
        return _tables(results[row.name]) if row.name in results else {}
    best: dict[str, dict[str, Any]] = {}
    for each in map(_tables, experts.values()):
        for task, table in each.items():
            name = _main(table)
            better = task not in best or (table[name][0] < best[task][name][0]) == metric(name).lower
            if better and (task not in best or table[name][0] != best[task][name][0]):
                best[task] = table
    return best


def _tables(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {task: dict(_estimates(values)) for task, values in results["results"].items() if any(_estimates(values))}


def _estimates(values: Mapping[str, Any]) -> Iterator[tuple[str, tuple[float, float]]]:
    for key, value in values.items():
        name, comma, rest = key.partition(",")
        if comma and not name.endswith("_stderr") and isinstance(value, int | float):
            error = values.get(f"{name}_stderr,{rest}")
            known = isinstance(error, int | float)
            label = name if rest == "none" else f"{name} ({rest})"
            yield label, (float(value), float(error) if known else math.nan)  # type: ignore[arg-type]


def _main(table: Mapping[str, Any]) -> str:
    return next((name for name in _FIRST if name in table), next(iter(table)))


def _with_results(row: Row, tables: Mapping[str, Mapping[str, Any]], kept: set[str]) -> Row:
    names = {task: f"{task} (lm_eval)" if task in kept else task for task in tables}
    main = {task: _main(table) for task, table in tables.items()}
    return replace(
        row,
        accuracies={**row.accuracies, **{names[t]: table[main[t]][0] for t, table in tables.items()}},
        errors={**row.errors, **{names[t]: table[main[t]][1] for t, table in tables.items()}},
        metrics={**row.metrics, **{names[t]: main[t] for t in tables}},
        details={**row.details, **{names[t]: dict(table) for t, table in tables.items()}},
    )


def _record(harness: Harness, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Versions, settings and all results, as they are in report.json."""
    from importlib.metadata import version

    any_of = next(iter(results.values()))
    settings = {each.name: getattr(harness, each.name) for each in fields(harness)}
    return {
        "name": harness.harness,
        "version": version("lm_eval"),
        "settings": {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()},
        "task_versions": dict(any_of.get("versions", {})),
        "samples": {task: dict(count) for task, count in any_of.get("n-samples", {}).items()},
        "results": {name: {task: dict(v) for task, v in each["results"].items()} for name, each in results.items()},
    }
