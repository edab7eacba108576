"""Several runs side by side: one table, and the curve of accuracy over what was swept."""

import json
from collections.abc import Mapping, Sequence
from os.path import commonpath
from pathlib import Path
from typing import Any

from suture.evaluation import Row
from suture.reporting.data import Report
from suture.reporting.write import write

_REFERENCES = ("pretrained", "experts")


def summarise(folders: Sequence[Path]) -> tuple[Report, Path] | None:
    """One report of the rows of finished runs, written with the curves into the folder they share.

    Runs that were not scored give nothing to compare: then nothing is written and None returned.
    """
    runs = [json.loads((folder / "report.json").read_text("utf-8")) for folder in folders]
    runs = [run for run in runs if run["rows"]]
    if not runs:
        return None
    references = {row["name"]: _row(row, runs[0]) for row in runs[0]["rows"] if row["name"] in _REFERENCES}
    swept = _swept(runs)
    report = Report(
        f"sweep of {len(runs)} runs",
        [*references.values(), *swept.values()],
        references.get("pretrained"),
        references.get("experts"),
        command=runs[0]["command"],
        curves=_curves(runs),
    )
    shared = Path(commonpath([str(folder) for folder in folders]))
    write(report, shared)
    return report, shared


def _row(data: dict[str, Any], run: dict[str, Any], name: str | None = None) -> Row:
    return Row(name or data["name"], data["accuracies"], run["samples"])


def _swept(runs: Sequence[dict[str, Any]]) -> dict[str, Row]:
    """What the runs found, without the references; rows that several runs have in common come once."""
    found: dict[str, Row] = {}
    for run in runs:
        for data in run["rows"]:
            if data["name"] not in _REFERENCES:
                name = f"{data['name']} {told(run, runs, data['name'])}".strip()
                found.setdefault(name, _row(data, run, name))
    return found


def told(run: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], row: str) -> str:
    """The knobs that differ between the runs of this method, and of this repair if the row is one of a repair."""
    return " ".join(f"{k}={v}" for k, v in _differing_of(run, runs, row).items())


def _differing_of(run: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], row: str) -> dict[str, Any]:
    groups = ("method", "repair") if " + " in row else ("method",)
    return {k: v for group in groups for k, v in _differing(run, runs, group).items()}


def _differing(run: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], group: str) -> dict[str, Any]:
    """Of a run of several methods, or a sweep, the knobs are not those of one row: nothing is said."""
    mine, kind = run["config"].get(group), "name" if group == "method" else "kind"
    if not isinstance(mine, Mapping):
        return {}
    others = [r["config"][group] for r in runs if isinstance(r["config"].get(group), Mapping)]
    peers = [other for other in others if other[kind] == mine[kind]]
    return {knob: mine[knob] for knob in mine if len({str(peer.get(knob)) for peer in peers}) > 1}


def curves_of(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[list[float]]]]:
    """Mean accuracy over each numeric knob that took several values while nothing else differed, as in report.json."""
    found = _curves(runs).items()
    return {knob: {name: [list(p) for p in curve.items()] for name, curve in curves.items()} for knob, curves in found}


def _curves(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[float, float]]]:
    curves: dict[str, dict[str, dict[float, float]]] = {}
    for run in runs:
        for data in run["rows"]:
            differing = _differing_of(run, runs, data["name"])
            if data["name"] not in _REFERENCES and len(differing) == 1:
                knob, value = next(iter(differing.items()))
                if isinstance(value, int | float) and not isinstance(value, bool):
                    curves.setdefault(knob, {}).setdefault(data["name"], {})[value] = data["mean"]
    several = {k: {n: dict(sorted(c.items())) for n, c in cs.items() if len(c) > 1} for k, cs in curves.items()}
    return {knob: found for knob, found in several.items() if found}
