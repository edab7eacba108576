"""Several runs side by side: one table, and the curve of accuracy over what was swept."""

import json
from collections.abc import Sequence
from os.path import commonpath
from pathlib import Path
from typing import Any

from suture.evaluation import Row
from suture.report.contents import Report
from suture.report.files import write
from suture.report.terminal import print_report

_KNOB = "scaling_factor"


def summarise(folders: Sequence[Path]) -> Path | None:
    """Print the rows of finished runs as one table and write it, with the curves, into the folder they share.

    Runs that were not scored give nothing to compare: then nothing is written and None returned.
    """
    runs = [json.loads((folder / "report.json").read_text("utf-8")) for folder in folders]
    runs = [run for run in runs if run["rows"]]
    if not runs:
        return None
    references = {
        row["name"]: _row(row, runs[0]) for row in runs[0]["rows"] if row["name"] in ("pretrained", "experts")
    }
    swept = [_row(run["rows"][-1], run, _label(run, runs)) for run in runs]
    report = Report(
        f"sweep of {len(runs)} runs",
        [*references.values(), *swept],
        references.get("pretrained"),
        references.get("experts"),
        command=runs[0]["command"],
        curves=_curves(runs),
    )
    shared = Path(commonpath([str(folder) for folder in folders]))
    write(report, shared)
    print_report(report)
    print(f"The sweep's report is in {shared}")
    return shared


def _row(data: dict[str, Any], run: dict[str, Any], name: str | None = None) -> Row:
    return Row(name or data["name"], data["accuracies"], run["samples"])


def _label(run: dict[str, Any], runs: Sequence[dict[str, Any]]) -> str:
    """The method's name with the knobs that differ between the runs of this method."""
    method = run["config"]["method"]
    peers = [r["config"]["method"] for r in runs if r["config"]["method"]["name"] == method["name"]]
    differ = [knob for knob in method if len({str(peer[knob]) for peer in peers}) > 1]
    return " ".join([method["name"], *(f"{k}={method[k]}" for k in differ)])


def _curves(runs: Sequence[dict[str, Any]]) -> dict[str, dict[float, float]]:
    """Mean accuracy over the scaling factor for each method, where it took more than one value."""
    curves: dict[str, dict[float, float]] = {}
    for run in runs:
        method = run["config"]["method"]
        if _KNOB in method:
            curves.setdefault(method["name"], {})[method[_KNOB]] = run["rows"][-1]["mean"]
    return {name: dict(sorted(curve.items())) for name, curve in curves.items() if len(curve) > 1}
