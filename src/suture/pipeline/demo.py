"""The demonstration: the models of suture-zoo, merged, calibrated, adapted and repaired."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from suture.core.extras import check_installed
from suture.pipeline import config as configuration
from suture.pipeline.models import open_models
from suture.pipeline.pipeline import Watch, run_settings, unwatched
from suture.pipeline.preflight import preflight_of
from suture.pipeline.results import RunResult
from suture.pipeline.settings import Settings
from suture.storage.atomic import new_folder

Arguments = Sequence[str]
_CALIBRATE = ("repair=calibrate", "repair.split=train", "repair.num_inputs=256")
_FINAL = ("repair=final",)
_DEEP = ("repair=deep", "repair.steps=200")
#: A method with its knobs, and the repairs of its merge.
_SHORT: tuple[tuple[Arguments, Sequence[Arguments]], ...] = (
    (["method=simple_average"], []),
    (["method=task_arithmetic"], []),
    (["method=ties_merging"], [_FINAL]),
    (["method=aswudi"], [_CALIBRATE]),
)
_FULL = (*_SHORT, (["method=lw_adamerging", "method.schedule=fast", "method.max_steps=250"], [_FINAL, _DEEP]))


def demo(
    output: Path | str | None = None, *, full: bool = False, overwrite: bool = False, watch: Watch = unwatched
) -> RunResult:
    """A run on the models of suture-zoo: eight experts merged, calibrated and repaired, without labels or a network.

    With `full` also AdaMerging, with final and deep surgery; with `overwrite` an earlier result is replaced. `watch` is
    called with each row of the table when it is known.
    """
    check_installed("suture demo")
    pools = ["modelpool=glyphs8", "taskpool=glyphs8"]
    pools += [f"output={output or new_folder('demo')}", f"overwrite={str(overwrite).lower()}"]
    runs, configs = [], []
    for words, repairs in _FULL if full else _SHORT:
        own = [configuration.compose([*words, *repair, *pools]) for repair in repairs or [()]]
        several = [Settings.from_config(config) for config in own]
        runs.append(replace(several[0], repairs=tuple(repair for each in several for repair in each.repairs)))
        configs += own
    models = open_models(runs[0].pool, runs[0].threads)
    checked = preflight_of(models, runs[0])
    checked.refuse()
    groups = {group: [config[group] for config in configs] for group in ("method", "repair")}
    command = {"command": "suture demo --full" if full else "suture demo"}
    return run_settings(runs, models, configs[0] | groups | command, checked.notes, watch=watch)
