"""The main job on one screen: open, check, merge, repair, score, report."""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from torch import Tensor

from suture.checkpoints import open_checkpoint
from suture.core.extras import check_installed
from suture.core.machine import circumstances
from suture.core.progress import Profile, bar
from suture.errors import ConfigError
from suture.evaluation import Row, SplitInputs
from suture.merging.task_masks import MASKS_FILE
from suture.pipeline import config as configuration
from suture.pipeline.context import Context
from suture.pipeline.generations import generations
from suture.pipeline.harness import measure
from suture.pipeline.model_card import write_card
from suture.pipeline.models import Models, open_models
from suture.pipeline.preflight import Preflight, preflight_of
from suture.pipeline.repairs import fit
from suture.pipeline.repeating import write_pools
from suture.pipeline.results import MergeResult
from suture.pipeline.scoring import Scores, expert_matrix, score_merge, score_model, score_references
from suture.pipeline.settings import Settings
from suture.repairs import (
    FINAL,
    AffineMaps,
    MaskedModel,
    RepairResult,
    SurgeryModel,
    fold_into_heads,
    unfoldable,
)
from suture.reporting import Report, write
from suture.reporting.chart import Chart
from suture.reporting.figures import chart_of_run
from suture.storage.atomic import new_directory

if TYPE_CHECKING:
    from pandas import DataFrame

Watch = Callable[[Row], None]


def unwatched(row: Row) -> None:
    """A `Watch` that does nothing."""


@dataclass(frozen=True)
class RunResult:
    """One finished run: its folder and its report.

    `unchanged`: the folder had this result already; then `report` is None.
    """

    folder: Path
    report: Report | None = None
    unchanged: bool = False

    def __repr__(self) -> str:
        content = "unchanged" if self.report is None else f"{len(self.report.rows)} models"
        return f"{type(self).__name__}({str(self.folder)!r}, {content})"

    def to_pandas(self) -> "DataFrame":
        """The accuracy table: one row for each model."""
        return self._known.to_pandas()

    def plot(self, figure: str = "accuracy") -> Chart:
        """One of the report's figures, which a notebook shows; raises `ConfigError` with the names of those it has."""
        return chart_of_run(self.folder, figure)

    def _repr_html_(self) -> str:
        where = escape(str(self.folder))
        return (self.report._repr_html_() if self.report else "") + f"<p>The model and the report are in {where}</p>"

    @property
    def _known(self) -> Report:
        if self.report is None:
            raise ConfigError(f"The run in '{self.folder}' was finished before. Remedy: read its report.json.")
        return self.report


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
    models = open_models(settings.pool, settings.threads)
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
        merged, repairs = [], {}
        scores = score_references(models, inputs, context, reuse=first.reuse) if first.tasks else Scores()
        rows = list(scores.rows)
        _tell(watch, rows)
        for settings in runs:
            part = folder if len(runs) == 1 else folder / "models" / settings.method.label
            own = replace(context, folder=part)
            result = _merge_into(part, settings, models, inputs, own)
            split = result.split or (search["split"] if search else "")
            merged.append(replace(result, how="; ".join(filter(None, (how, result.how))), split=split))
            fits = _fits(settings, models, merged[-1], inputs, own)
            repairs[merged[-1].label] = fits
            folding = _save_repairs(fits, models, merged[-1], inputs, part)
            notes = [*notes, *folding]
            if first.tasks:
                rows += _tell(watch, score_merge(merged[-1], fits, models, inputs, own))
        record = None
        if first.harness is not None:
            with profile("lm_eval"):
                folders, device = _folders(folder, merged, repairs), str(context.device.device)
                so_far = replace(scores, rows=rows)
                measured = measure(first.harness, models, merged, repairs, folders, so_far, device)
            scores, rows, record = measured.scores, list(measured.scores.rows), measured.record
            notes = [*notes, *measured.notes]
        warnings = [line for result in merged for line in result.warnings]
        warnings += [line for fits in repairs.values() for fitted in fits for line in fitted.warnings]
        report = Report(
            f"{', '.join(result.label for result in merged)} of {len(models.experts)} models",
            rows,
            scores.pretrained,
            scores.experts,
            config=config,
            provenance=models.provenance,
            profile=profile.seconds,
            circumstances=circumstances(),
            repeat=write_pools(config, folder, first.output),
            notes=[*notes, *context.notes(), *warnings],
            command=config.get("command", ""),
            learning={result.label: result.learned for result in merged if result.learned},
            search=search,
            harness=record,
            generations=generations(first.generation, models, merged, context) if first.generation else (),
            repairs={" + ".join((label, *fitted.chain)): fitted for label, fits in repairs.items() for fitted in fits},
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
    few = settings.batch_size if settings.fast else None
    return context, SplitInputs(models.family, settings.tasks, first=few, track=bar, profile=profile)


def merge_in_memory(settings: Settings) -> tuple[Models, MergeResult, list[RepairResult]]:
    """Merge and repair without logs, scores or files, except the states of loops."""
    models = open_models(settings.pool, settings.threads)
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
    models = open_models(settings.pool, settings.threads)
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


def _tell(watch: Watch, rows: list[Row]) -> list[Row]:
    for row in rows:
        watch(row)
    return rows


def _folders(
    folder: Path, merged: Sequence[MergeResult], repairs: Mapping[str, Sequence[RepairResult]]
) -> dict[str, Path]:
    """Name of a row → the folder of its model, of the merges and of the repairs that change weights alone."""
    folders = {}
    for result in merged:
        part = folder if len(merged) == 1 else folder / "models" / result.label
        folders[result.label] = part / "model"
        static = [fitted for fitted in repairs.get(result.label, ()) if fitted.tensors is not None]
        folders |= {fitted.name: part / "_".join(("model", *fitted.chain)) for fitted in static}
    return folders


def _fits(
    settings: Settings, models: Models, merged: MergeResult, inputs: SplitInputs, context: Context
) -> list[RepairResult]:
    """The models of the tasks that the method itself leaves, then every repair of the settings."""
    fits = [merged.masked] if merged.masked else []
    return fits + [each for repair in settings.repairs for each in fit(repair, models, merged, inputs, context)]


def _merge_into(folder: Path, settings: Settings, models: Models, inputs: SplitInputs, context: Context) -> MergeResult:
    """Write the model as its family saves it, and the learned coefficients, if any."""
    began = time.perf_counter()
    with models.new_model(folder / "model") as out:
        merged = settings.method.merge(models, inputs, context, out)
    if merged.learned is not None:
        merged.learned.save(folder, also_as=settings.method.knobs.get("save_merging_weights"))
    seconds = merged.seconds or time.perf_counter() - began
    return replace(merged, tensors=dict(models.mergeable(open_checkpoint(folder / "model"))), seconds=seconds)


def _read_from(models: Models, settings: Settings) -> list[Path]:
    """The files and folders that a run reads, which its output must not replace."""
    sources = [Path(task.source).expanduser() for task in settings.tasks]
    return [*models.files, *(source for source in sources if source.exists())]


@contextmanager
def _encodings(folder: Path) -> Iterator[Path]:
    """A temporary folder for the encodings of one run."""
    with TemporaryDirectory(prefix=".encodings-", dir=folder) as name:
        yield Path(name)


def _save_repairs(
    repairs: Sequence[RepairResult], models: Models, merged: MergeResult, inputs: SplitInputs, folder: Path
) -> list[str]:
    """Repaired weights as a model directory, masks and modules as safetensors; returns notes about folded maps."""
    beside = [fitted for fitted in repairs if fitted.tensors is None and not isinstance(fitted.model, MaskedModel)]
    notes = []
    for fitted in repairs:
        if isinstance(fitted.model, MaskedModel):
            fitted.model.save(folder / MASKS_FILE, models.stored_names, models.whole_base)
            continue
        if fitted.tensors is None:
            name = f"surgery_{fitted.kind}" if len(beside) > 1 else "surgery"
            fitted.model.save(folder / f"{name}.safetensors")
            notes += _save_folded(fitted, models, merged, inputs, folder)
        else:
            _save_weights(fitted.tensors, models, merged, folder / "_".join(("model", *fitted.chain)))
    return notes


def _save_weights(tensors: Mapping[str, Tensor], models: Models, merged: MergeResult, folder: Path) -> None:
    with models.new_model(folder) as out:
        for name, tensor in out.items():
            tensor.copy_(tensors.get(name, merged.tensors[name]))


def _save_folded(
    fitted: RepairResult, models: Models, merged: MergeResult, inputs: SplitInputs, folder: Path
) -> list[str]:
    """For affine maps, a model directory with the maps folded into its heads, or a note that says why there is none."""
    maps = fitted.model.repair_at[FINAL] if isinstance(fitted.model, SurgeryModel) else None
    if not isinstance(maps, AffineMaps):
        return []
    heads = {name: inputs[fitted.split or "test"][name].head for name in fitted.tasks}
    known = {name: head for name, head in heads.items() if head is not None}
    reasons = {name: unfoldable(head) or "has no bias" * (head.bias is None) for name, head in known.items()}
    problem = next((f"that of {name!r} {reason}" for name, reason in reasons.items() if reason), "")
    if not problem:
        out = folder / "_".join(("model", *fitted.chain))
        _save_weights(fitted.model.network.module.state_dict(), models, merged, out)
        if models.family.write_heads(out, fold_into_heads(maps, fitted.tasks, known)):
            return []
        shutil.rmtree(out)
        problem = f"family={models.family.name} stores no heads of single tasks"
    return [f"The affine maps stay beside the model and are not folded into the heads: {problem}."]


def _is_finished(output: Path, config: Mapping[str, Any], models: Models) -> bool:
    """Whether a folder holds a finished run with the same configuration, inputs and versions."""
    try:
        report = json.loads((output / "report.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return _decisive(report["config"]) == _decisive(config) and report["provenance"] == models.provenance


def _decisive(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in ("reuse", "overwrite", "command")}
