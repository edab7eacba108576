"""The main job on one screen: open, check, merge, repair, score, report."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from suture.checkpoints import open_checkpoint
from suture.core.batch_sizes import fixed_size
from suture.core.extras import check_installed
from suture.core.machine import circumstances
from suture.core.progress import Profile, bar
from suture.errors import ConfigError
from suture.evaluation import Row, SplitInputs
from suture.pipeline import config as configuration
from suture.pipeline.context import Context
from suture.pipeline.fitting import fit
from suture.pipeline.generations import generations
from suture.pipeline.harness import measure
from suture.pipeline.model_card import write_card
from suture.pipeline.models import Models, open_models
from suture.pipeline.preflight import Preflight, preflight_of
from suture.pipeline.repeating import write_pools
from suture.pipeline.results import MergeResult, Outcome, RunResult
from suture.pipeline.saving import merge_into, save_repairs
from suture.pipeline.scoring import Scores, expert_matrix, score_merge, score_model, score_references
from suture.pipeline.settings import Settings
from suture.repairs import RepairResult
from suture.reporting import Report, write
from suture.storage.atomic import new_directory

Watch = Callable[[Row], None]


def unwatched(row: Row) -> None:
    """A `Watch` that does nothing."""


def run(config: Mapping[str, Any] | Sequence[str] | None = None, /, **keywords: Any) -> RunResult | Preflight:
    """Merge the models of a pool, score every result, and leave one folder with the model and a report.

    `config` is a composed configuration, or a list of arguments as on the command line; or give its keys as keywords:

        suture.run(method="ties_merging", modelpool="glyphs8", taskpool="glyphs8", repair="final", output="out")

    Groups (`method`, `modelpool`, `taskpool`, `repair`) are names, or mappings with their keys; single keys of a group
    may be given as `**{"method.scaling_factor": 0.4}`. With `dry_run` nothing is merged, and the `Preflight` is
    returned. Raises `SutureError` for the first problem, before any slow work.
    """
    config = configuration.composed(config, keywords)
    settings = Settings.from_config(config)
    if not settings.dry_run:
        check_installed("suture run")
    models = open_models(settings.pool, settings.threads, channels_last=settings.channels_last)
    if settings.reuse and _is_finished(settings.output, config, models):
        return RunResult(settings.output, unchanged=True)
    checked = preflight_of(models, settings)
    if settings.dry_run:
        return checked
    checked.refuse()
    return run_settings([settings], models, config, checked.notes)


def run_settings(
    runs: Sequence[Settings],
    models: Models,
    config: Mapping[str, Any],
    notes: Sequence[str] = (),
    *,
    how: str = "",
    search: Mapping[str, Any] | None = None,
    watch: Watch = unwatched,
) -> RunResult:
    """Merge one pool by one or several methods. The output folder appears when it is complete.

    `how` says how the knobs were chosen; `search` is the record of a search for them, as it is in report.json.
    `watch` is called with each row of the table when it is known.
    """
    first, profile = runs[0], Profile()
    target = new_directory(first.output, overwrite=first.overwrite, inputs=_read_from(models, first))
    with target as folder, _encodings(folder) as encodings:
        context, inputs = prepare(first, models, folder, profile, encodings)
        scores = score_references(models, inputs, context, reuse=first.reuse) if first.tasks else Scores()
        rows, outcomes = _tell(watch, scores.rows), []
        for settings in runs:
            part = folder if len(runs) == 1 else folder / settings.method.label
            own = replace(context, folder=part)
            outcome = _merge_and_repair(settings, models, inputs, own).chosen(how, (search or {}).get("split", ""))
            outcomes.append(outcome)
            if first.tasks:
                rows += _tell(watch, score_merge(outcome.merged, outcome.repairs, models, inputs, own))
        measured = measure(first.harness, models, outcomes, replace(scores, rows=rows), context)
        of = f"{len(models.experts)} model{'s' * (len(models.experts) > 1)}"
        report = Report(
            f"{', '.join(outcome.label for outcome in outcomes)} of {of}",
            measured.scores.rows,
            measured.scores.pretrained,
            measured.scores.experts,
            config=config,
            provenance=models.provenance,
            profile=profile.seconds,
            circumstances=circumstances(),
            repeat=write_pools(config, folder, first.output),
            notes=[*notes, *measured.notes, *context.notes(), *(line for each in outcomes for line in each.lines)],
            command=config.get("command", ""),
            learning={each.label: each.merged.learned for each in outcomes if each.merged.learned},
            search=search,
            harness=measured.record,
            generations=generations(first.generation, models, outcomes, context),
            repairs={name: fitted for each in outcomes for name, fitted in each.named_repairs.items()},
        )
        write(report, folder)
        configuration.save(dict(config), folder / "config.yaml")
        if len(runs) == 1:
            write_card(folder)
    return RunResult(first.output, report)


def prepare(
    settings: Settings, models: Models, folder: Path, profile: Profile, encodings: Path | None = None
) -> tuple[Context, SplitInputs]:
    """The context of a run, and the inputs of its tasks, which are decoded when needed."""
    fingerprint = {"models": models.provenance["inputs"], "tasks": str(settings.taskpool)}
    context = Context(
        folder,
        json.dumps(fingerprint, sort_keys=True),
        settings.fabric,
        settings.seed,
        settings.batch_size,
        settings.fast,
        profile,
        encodings,
    )
    few = fixed_size(settings.batch_size) if settings.fast else None
    return context, SplitInputs(models.family, settings.tasks, first=few, track=bar, profile=profile)


def merge_in_memory(settings: Settings) -> tuple[Models, MergeResult, list[RepairResult]]:
    """Merge and repair without logs, scores or files, except the states of loops."""
    models = open_models(settings.pool, settings.threads, channels_last=settings.channels_last)
    preflight_of(models, settings).refuse()
    with TemporaryDirectory() as folder:
        quiet = replace(settings, fabric={**settings.fabric, "loggers": {"kind": "none"}})
        context, inputs = prepare(quiet, models, Path(folder), Profile(), Path(folder) / "encodings")
        merged = settings.method.merge(models, inputs, context)
        return models, merged, _fits(settings, models, merged, inputs, context)


def evaluate_pool(
    config: Mapping[str, Any] | Sequence[str] | None = None,
    /,
    *,
    model: str | None = None,
    matrix: bool = False,
    **keywords: Any,
) -> Report:
    """Score the pool's pretrained model and experts, and, if given, one more `model` of the same architecture.

    The configuration is given as for `run`. With `matrix` every fine-tuned model is also scored on every task, and the
    report, with a heat map, is written if the configuration names an output folder.
    """
    check_installed("suture evaluate")
    config = configuration.composed(config, keywords, method="simple_average")
    settings = Settings.from_config(config)
    if not settings.tasks:
        raise ConfigError("There is nothing to evaluate on. Remedy: name a taskpool=…")
    models = open_models(settings.pool, settings.threads, channels_last=settings.channels_last)
    preflight_of(models, settings).refuse()
    one_more = {} if model is None else {Path(model).name: models.mergeable(open_checkpoint(model))}
    written = matrix and config["output"]
    inputs_of = _read_from(models, settings)
    target = new_directory(settings.output, overwrite=settings.overwrite, inputs=inputs_of)
    with target if written else nullcontext() as folder:
        context, inputs = prepare(settings, models, folder or settings.output, Profile())
        scores = score_references(models, inputs, context)
        rows = [score_model(name, checkpoint, models, inputs, context) for name, checkpoint in one_more.items()]
        report = Report(
            "evaluation",
            [*scores.rows, *rows],
            scores.pretrained,
            scores.experts,
            matrix=expert_matrix(models, inputs, context) if matrix else (),
        )
        if folder:
            write(report, folder)
    return report


def _tell(watch: Watch, rows: Sequence[Row]) -> list[Row]:
    for row in rows:
        watch(row)
    return list(rows)


def _merge_and_repair(settings: Settings, models: Models, inputs: SplitInputs, context: Context) -> Outcome:
    """Merge by one method, fit its repairs, and write all of them into the context's folder."""
    merged = merge_into(context.folder, settings.method, models, inputs, context)
    repairs = _fits(settings, models, merged, inputs, context)
    notes = save_repairs(repairs, models, merged, inputs, context.folder)
    return Outcome(merged, repairs, context.folder, notes)


def _fits(
    settings: Settings, models: Models, merged: MergeResult, inputs: SplitInputs, context: Context
) -> list[RepairResult]:
    """The models of the tasks that the method itself leaves, then every repair of the settings."""
    fits = [merged.masked] if merged.masked else []
    return fits + [each for repair in settings.repairs for each in fit(repair, models, merged, inputs, context)]


def _read_from(models: Models, settings: Settings) -> list[Path]:
    """The files and folders that a run reads, which its output must not replace."""
    sources = [Path(task.source).expanduser() for task in settings.tasks]
    return [*models.files, *(source for source in sources if source.exists())]


@contextmanager
def _encodings(folder: Path) -> Iterator[Path]:
    """A temporary folder for the encodings of one run."""
    with TemporaryDirectory(prefix=".encodings-", dir=folder) as name:
        yield Path(name)


def _is_finished(output: Path, config: Mapping[str, Any], models: Models) -> bool:
    """Whether a folder holds a finished run with the same configuration, inputs and versions."""
    try:
        report = json.loads((output / "report.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return _decisive(report["config"]) == _decisive(config) and report["provenance"] == models.provenance


def _decisive(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in ("reuse", "overwrite", "command")}
