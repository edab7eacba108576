"""The main job on one screen: open, check, merge, evaluate, report."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suture.checkpoints import open_checkpoint
from suture.errors import ConfigError
from suture.pipeline.models import OpenModels
from suture.pipeline.preflight import Preflight
from suture.pipeline.settings import Run
from suture.storage.atomic import new_directory, new_folder

if TYPE_CHECKING:
    from suture.reporting import Report

_REPAIRS = (("surgery=final",), ("surgery=deep", "surgery.steps=200"))
_DEMO: tuple[tuple[Sequence[str], Sequence[Sequence[str]]], ...] = (
    (["method=simple_average"], []),
    (["method=task_arithmetic"], []),
    (["method=ties_merging"], _REPAIRS[:1]),
    (["method=lw_adamerging", "method.schedule=fast", "method.max_steps=250"], _REPAIRS),
)


def run_configured(config: Mapping[str, Any]) -> Path | Preflight:
    """One run from its configuration: prints the table and returns the folder; after a dry run what was found."""
    from suture.cli.tables import print_preflight

    run = Run.from_config(config)
    models = OpenModels(run)
    if config["reuse"] and is_finished(run.output, config, models):
        print(f"{run.output} holds the result of this very run already.")
        return run.output
    found = models.preflight()
    if config["dry_run"]:
        print_preflight(found)
    found.refuse()
    return found if config["dry_run"] else merge_and_report([run], models, config, found.notes)


def is_finished(output: Path, config: Mapping[str, Any], models: OpenModels) -> bool:
    """Whether a folder holds a whole run of the same words on the same inputs and versions."""
    try:
        report = json.loads((output / "report.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    told = lambda c: {key: value for key, value in c.items() if key not in ("reuse", "overwrite")}
    return told(report["config"]) == told(dict(config)) and report["provenance"] == models.provenance()


def check_run(config: Mapping[str, Any]) -> None:
    """Refuse a configuration whose words or values do not fit, without opening a file."""
    Run.from_config(config)


def demo(output: Path | None = None) -> Path:
    """The main job on the models that ship with suture: eight experts into one, merged, adapted and repaired."""
    from suture.pipeline.config import compose

    pools = ["modelpool=glyphs8", "taskpool=glyphs8", f"output={output or new_folder('demo')}"]
    runs, configs = [], []
    for words, repairs in _DEMO:
        configs += [compose([*words, *repair, *pools]) for repair in repairs or [()]]
        several = [Run.from_config(config) for config in configs[-max(1, len(repairs)) :]]
        runs.append(replace(several[0], repairs=tuple(repair for run in several for repair in run.repairs)))
    models = OpenModels(runs[0])
    found = models.preflight()
    found.refuse()
    told = {group: [config[group] for config in configs] for group in ("method", "surgery")}
    return merge_and_report(runs, models, configs[0] | told, found.notes)


def merge_and_report(runs: Sequence[Run], models: OpenModels, config: Mapping[str, Any], notes: Sequence[str]) -> Path:
    """Merge by one or several methods, score every result, report. The run's folder appears when all is there."""
    from suture.cli.tables import print_report
    from suture.pipeline import config as configuration
    from suture.pipeline.model_card import write_card
    from suture.reporting import Learning, RepairReport, Report, write

    first, merged = runs[0], {}
    with new_directory(first.output, overwrite=first.overwrite) as folder:
        for run in runs:
            place = folder if len(runs) == 1 else folder / "models" / run.label
            merged[run.label] = models.merge_into(place, run)
        scores = models.score(merged) if first.taskpool else ([], None, None)
        report = Report(
            f"{', '.join(merged)} of {len(models.models)} models",
            *scores,
            config=config,
            provenance=models.provenance(),
            profile=models.profile.seconds,
            notes=[*notes, *(note for result in merged.values() for note in result.notes)],
            command=shlex.join(["suture", *sys.argv[1:]]),
            learning={label: Learning.of(m.adapted) for label, m in merged.items() if m.adapted},
            repairs={f"{label} + {r.kind}": RepairReport.of(r) for label, m in merged.items() for r in m.repaired},
        )
        write(report, folder)
        configuration.save(dict(config), folder / "config.yaml")
        if len(runs) == 1:
            write_card(folder)
    print_report(report)
    print(f"The merged model and the report are in {first.output}")
    return first.output


def check_configured(config: Mapping[str, Any]) -> Preflight:
    """The preflight of a run, nothing else."""
    return OpenModels(Run.from_config(config)).preflight()


def evaluate_configured(config: Mapping[str, Any], model: str | None = None, matrix: bool = False) -> "Report":
    """Score the pool's pretrained model and experts, and one more model of the same architecture if it is named.

    With `matrix` every fine-tuned model is scored on every task too, and the report, a heat map in it, is written
    where the configuration names an output folder.
    """
    from suture.cli.tables import print_report
    from suture.reporting import Report, write

    run = Run.from_config(config)
    if run.taskpool is None:
        raise ConfigError("There is nothing to evaluate on. Remedy: name a taskpool=…")
    models = OpenModels(run)
    models.preflight().refuse()
    named = {Path(model).name: models.mergeable(open_checkpoint(model))} if model else {}
    written = matrix and config["output"]
    with new_directory(run.output, overwrite=run.overwrite) if written else nullcontext() as folder:
        rows, pretrained, experts = models.score(named)
        report = Report("evaluation", rows, pretrained, experts, matrix=models.matrix() if matrix else ())
        if folder:
            write(report, folder)
    print_report(report)
    return report
