"""Preflight: checks before any slow work, and estimates of the bytes read, written and held in memory."""

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from suture import tasks
from suture.adaptation.objectives import get_objective
from suture.adaptation.sharded_model import refuse_unsharded
from suture.checkpoints import Checkpoint, Source, open_checkpoint, open_fine_tuned
from suture.checkpoints.adapter_bases import base_notes
from suture.checkpoints.adapters import untied
from suture.checkpoints.matching import matched
from suture.core.fabric import SHARDED, forks, started_processes
from suture.core.names import in_bytes
from suture.errors import BASE, PRETRAINED, ConfigError, SutureError, unknown_name
from suture.merging.compatibility import compatibility, merged_names, spec_of
from suture.merging.registry import MergeMethod, get_method
from suture.merging.task_vectors import TaskVectors, working_memory
from suture.merging.tensorwise import Merging
from suture.pipeline.adamerging import AdaMerging
from suture.pipeline.models import Models, open_models
from suture.pipeline.pools import TaskPool
from suture.pipeline.settings import Settings

_SAMPLE = 1024  # entries checked at the start, the middle and the end of a tensor


@dataclass
class Preflight:
    """The result of a preflight. Sizes are in bytes; `problems` stop a run, `notes` do not."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tensors: int = 0
    parameters: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    memory: int = 0
    disk_free: int = 0

    def refuse(self) -> None:
        """Raise `SutureError` with the first problem and the number of others, if there are any."""
        if self.problems:
            more = len(self.problems) - 1
            rest = f" (and {more} more problem{'s' * (more > 1)}; `suture check` lists all)" if more else ""
            raise SutureError(self.problems[0] + rest)


def preflight(
    base: Checkpoint,
    models: Mapping[str, Checkpoint],
    method: MergeMethod | None = None,
    taskpool: TaskPool | None = None,
    *,
    knobs: Mapping[str, Any] | None = None,
    frozen: tuple[str, ...] = (),
    mixed_dtypes: bool = False,
    output: Path | None = None,
    bytes_written: int | None = None,
    threads: int = 0,
    pool: bool = True,
) -> Preflight:
    """Check models, tasks and disk space from headers and a few samples of each tensor; nothing is written.

    With `pool` the keys of a model pool are named as remedies.
    """
    checked = Preflight()
    checked.problems += compatibility(base, models, frozen=frozen, mixed_dtypes=mixed_dtypes, pool=pool)
    if method is not None and (problem := method.check_number(len(models))):
        checked.problems.append(problem)
    names = merged_names(base, frozen)
    labelled = [(PRETRAINED if pool else BASE, base), *models.items()]
    checked.problems += non_finite_samples(labelled, names)
    checked.notes += _batch_norm_notes(base, models, names)
    checked.notes += [
        f"'{label}' has the prefix '{model.prefix}' before all of its names, which is left out."
        for label, model in labelled
        if model.prefix
    ]
    _measure(checked, base, models, names, method, knobs, threads)
    if method is not None and method.matrices and not checked.problems:
        _check_matrices(checked, base, models, method, knobs, frozen, threads)
    if bytes_written is not None:
        checked.bytes_written = bytes_written
    if output is not None:
        checked.problems += _disk_problems(checked, output)
    if taskpool is not None:
        _check_tasks(checked, models, taskpool)
    return checked


def _check_tasks(checked: Preflight, models: Mapping[str, Checkpoint], taskpool: TaskPool) -> None:
    for task in taskpool.tasks:
        problems = tasks.check(task, "test")
        checked.problems += problems
        checked.notes += [] if problems else tasks.notes(task, "test")
    checked.problems += _expert_problems(models, taskpool)
    checked.notes += _expert_notes(models, taskpool)


def check(config: Mapping[str, Any] | Sequence[str] | None = None, /, **keywords: Any) -> Preflight:
    """The preflight of a run, without running it; the configuration is given as for `suture.run`.

    With `base` and `models` (name → source) it is that of a merge of files, as `suture.merge_files` takes them; the
    other keywords are then `method` and `output`, and there is no pool.
    """
    from suture.pipeline import config as configuration

    if config is None and keywords.keys() & {"base", "models"}:
        return _check_files(**keywords)

    settings = Settings.from_config(configuration.composed(config, keywords, method="simple_average"))
    return preflight_of(open_models(settings.pool, settings.threads), settings)


def _check_files(
    base: Source | None = None,
    models: Mapping[str, Source] | None = None,
    method: str = "simple_average",
    output: str | Path | None = None,
    **other: Any,
) -> Preflight:
    """The preflight of a merge of files, from headers and samples alone."""
    if other:
        wanted = "base, models, method and output"
        raise ConfigError(f"{next(iter(other))}: a check of files takes {wanted} alone. Remedy: leave it out.")
    if base is None or not models:
        missing = "base" if base is None else "models.NAME"
        raise ConfigError(f"Missing argument: {missing}=…, the path of a model.")
    opened = untied(open_checkpoint(base, label=BASE), models.values())
    experts = {name: open_fine_tuned(model, opened, label=name) for name, model in models.items()}
    found = matched(opened, experts)
    folder = None if output is None else Path(output)
    checked = preflight(found.base, found.models, get_method(method), output=folder, pool=False)
    checked.notes += [*found.notes, *base_notes(experts, opened)]
    return checked


def preflight_of(models: Models, settings: Settings) -> Preflight:
    """The preflight of a run with open models."""
    method = settings.method
    checked = preflight(
        models.base,
        models.experts,
        method.static,
        settings.taskpool,
        knobs=method.knobs,
        frozen=(*models.pool.frozen, *method.frozen),
        mixed_dtypes=settings.pool.mixed_dtypes,
        output=settings.output,
        bytes_written=sum(spec.nbytes for spec in models.whole_base.specs.values()),
        threads=settings.threads,
    )
    checked.notes += models.notes
    checked.problems[:0] = dict.fromkeys(line for task in settings.tasks for line in models.family.problems(task))
    if not models.base.specs:
        first, kind = next(iter(models.whole_base), "no tensor"), models.family.name
        remedy = "name another family in the pool, or merge files of any kind by suture merge."
        line = f"{PRETRAINED} has no tensor that family={kind} merges (it has '{first}', …)."
        checked.problems.insert(0, f"{line} Remedy: {remedy}")
    if settings.generation is not None and not checked.problems:
        try:
            settings.generation.requests(models)
        except SutureError as error:
            checked.problems.append(str(error))
    if settings.harness is not None:
        checked.problems += settings.harness.problems()
    checked.problems += idle_processes(settings) + sharding_problems(settings)
    if not checked.problems:
        unmatched = models.unmatched(settings.task_names) if settings.repairs else []
        checked.problems += dict.fromkeys([*unmatched, *method.problems(models, settings.task_names)])
        checked.memory = method.memory(models) or checked.memory
    return checked


def idle_processes(settings: Settings) -> list[str]:
    """The reason why processes that were started with the command would all do the same, if they would."""
    count = started_processes() or 1
    if count == 1 or isinstance(settings.method, AdaMerging):
        return []
    given = f"torchrun or Slurm starts this command as {count} processes"
    return [f"{given}, but only AdaMerging shares its work over them. Remedy: one process."]


def sharding_problems(settings: Settings) -> list[str]:
    """The reason why a run cannot split its weights over processes, if it is to."""
    if settings.fabric.get("strategy") != SHARDED:
        return []
    if not forks(settings.fabric) and (settings.repairs or not isinstance(settings.method, AdaMerging)):
        given = f"fabric.strategy={SHARDED} on several machines, or by torchrun or Slurm, is for AdaMerging alone"
        return [f"{given}. Remedy: repair=none, or one command on one machine."]
    if wrong := _whole_weights(settings):
        given = f"fabric.strategy={SHARDED} with {wrong}"
        return [f"{given}, which needs whole weights on one device. Remedy: leave one out."]
    if not isinstance(settings.method, AdaMerging):
        return []
    try:
        options = settings.method.options
        refuse_unsharded(options, get_objective(options.objective), settings.method.eval_iterations)
    except ConfigError as error:
        return [str(error)]
    return []


def refuse_split(settings: Settings, verb: str) -> None:
    """Raise `ConfigError` if weights are to be split over processes in a job that has no use for parts of them."""
    if settings.fabric.get("strategy") == SHARDED:
        given = f"fabric.strategy={SHARDED} with {verb}"
        raise ConfigError(f"{given}, which needs whole weights on one device. Remedy: leave it out.")


def _whole_weights(settings: Settings) -> str:
    """The first key of a run that needs whole weights on one device."""
    method, chain = settings.method, [each for repair in settings.repairs for each in repair.all]
    if method.static is None and not (isinstance(method, AdaMerging) and method.weights is None):
        return f"method={method.label}"
    if kind := next((each.kind.name for each in chain if each.kind.whole), None):
        return f"repair={kind}"
    if any(each.options.eval_iterations for each in chain):
        return "repair.eval_iterations"
    if settings.harness is not None:
        return "evaluate.harness"
    return "generate" if settings.generation is not None else ""


def non_finite_samples(models: Iterable[tuple[str, Checkpoint]], names: list[str]) -> list[str]:
    """One line for each tensor with NaN or Inf in a sample of its first, middle and last entries."""
    problems = []
    for label, model in models:
        for name in names:
            if name in model and not all(part.isfinite().all() for part in _samples(model, name)):
                problems.append(
                    f"'{name}' holds NaN or Inf in '{label}'. "
                    "Remedy: export that checkpoint again; it cannot be merged as it is."
                )
    return problems


def _samples(model: Checkpoint, name: str) -> Iterator[torch.Tensor]:
    flat = model.flat(name)
    for start in {0, max(0, len(flat) // 2 - _SAMPLE // 2), max(0, len(flat) - _SAMPLE)}:
        yield flat[start : start + _SAMPLE].float()


def _batch_norm_notes(base: Checkpoint, models: Mapping[str, Checkpoint], names: list[str]) -> list[str]:
    """A note on which experts have the base's BatchNorm statistics, which decides whether new ones can help."""
    statistics = [name for name in names if name.endswith(("running_mean", "running_var"))]
    if not statistics:
        return []
    same = {
        label: all(name in model and torch.equal(base[name], model[name]) for name in statistics)
        for label, model in models.items()
    }
    frozen = [label for label, equal in same.items() if equal]
    moved = [label for label, equal in same.items() if not equal]
    note = f"{len(statistics)} BatchNorm statistics are merged like weights; they are never re-estimated unasked."
    if moved:
        note += f" They differ from the base's in {', '.join(moved)} (trained with batch statistics)."
    if frozen:
        note += f" They equal the base's in {', '.join(frozen)} (trained with frozen statistics)."
    return [note]


def _measure(checked, base, models, names, method, knobs, threads) -> None:
    checked.tensors = len(names)
    checked.parameters = sum(base.specs[name].numel for name in names)
    passes = 1 if method is None else method.times_read(knobs or {})
    sizes = [spec_of(model, name).nbytes for model in (base, *models.values()) for name in names if name in model]
    checked.bytes_read = passes * sum(sizes)
    checked.bytes_written = sum(spec.nbytes for spec in base.specs.values())
    checked.memory = working_memory(len(models), threads)


def _check_matrices(checked, base, models, method, knobs, frozen, threads) -> None:
    """Options and memory of a method on whole matrices."""
    vectors = TaskVectors(base, models, frozen, threads)
    merging = Merging(vectors, method, lambda name: knobs or {}, lambda piece, merged: None)
    try:
        merging.check()
    except ConfigError as error:
        checked.problems.append(str(error))
        return
    checked.memory = max(checked.memory, merging.held())


def _disk_problems(checked: Preflight, output: Path) -> list[str]:
    existing = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    checked.disk_free = shutil.disk_usage(existing).free
    if checked.disk_free >= checked.bytes_written:
        return []
    return [
        f"'{output}' needs {in_bytes(checked.bytes_written)} but {existing} has {in_bytes(checked.disk_free)} free. "
        "Remedy: free some space or choose another output folder."
    ]


def _expert_problems(models: Mapping[str, Checkpoint], taskpool: TaskPool) -> list[str]:
    problems = []
    for task in taskpool.tasks:
        if task.model is not None and task.model not in models:
            problems.append(f"Task '{task.name}': {unknown_name('model', task.model, models)}")
        elif task.expert != task.name and task.name in models:
            problems.append(
                f"Task '{task.name}' has the name of a model, but model={task.model}. Remedy: rename the task."
            )
    return problems


def _near(task: str, models: Iterable[str]) -> str:
    near = get_close_matches(task, list(models), n=1)
    return f" Did you mean '{near[0]}'?" if near else ""


def _expert_notes(models: Mapping[str, Checkpoint], taskpool: TaskPool) -> list[str]:
    named = {task.name for task in taskpool.tasks}
    alone = sorted(task.name for task in taskpool.tasks if task.expert not in models)
    lone = "has no model of its name: no expert to compare with."
    notes = [f"Task '{task}' {lone}{_near(task, models)}" for task in alone]
    return notes + [f"Model '{model}' is merged but has no task of its name." for model in sorted(set(models) - named)]
