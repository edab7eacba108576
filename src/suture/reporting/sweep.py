"""The summary of a sweep: a table of all runs on the same pools, and curves of accuracy over the swept knobs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os.path import commonpath
from pathlib import Path
from shlex import quote
from typing import Any

from suture.evaluation import Row
from suture.reporting.data import Report
from suture.reporting.files import write
from suture.reporting.run_folder import flat, is_reference, read
from suture.reporting.seeds import by_seed

_FACTS = ("needs_task", "learned", "split", "added_parameters", "routing")
Curves = dict[str, dict[str, dict[float, float]]]  # knob → model → value of the knob → mean accuracy


@dataclass(frozen=True)
class Summary:
    """The report of the runs of a sweep that have the same pools, and its folder."""

    report: Report
    folder: Path


def summarise(folders: Sequence[Path]) -> list[Summary]:
    """Write a report of finished runs, with the curves, into their common parent folder.

    Runs of different models or tasks do not stand in one table: then each set of pools has a report, in the folders
    pools-1, pools-2, … of the common one. Nothing is written of runs that were not scored.
    """
    known = [(folder, run) for folder, run in ((each, read(each).data) for each in folders) if run["rows"]]
    if not known:
        return []
    shared = Path(commonpath([str(folder) for folder, _ in known]))
    groups: dict[str, list[tuple[Path, Mapping[str, Any]]]] = {}
    for folder, run in known:
        groups.setdefault(_pools(run), []).append((folder, run))
    if len(groups) == 1:
        return [_summary(known, shared, shared)]
    return [_summary(group, shared, shared / f"pools-{i}") for i, group in enumerate(groups.values(), 1)]


def _pools(run: Mapping[str, Any]) -> str:
    return json.dumps([run["config"].get(group) for group in ("modelpool", "taskpool")], sort_keys=True, default=str)


def _summary(known: Sequence[tuple[Path, Mapping[str, Any]]], shared: Path, out: Path) -> Summary:
    """Write the report of runs on the same pools into a folder."""
    folders, runs = [folder for folder, _ in known], [run for _, run in known]
    references = {row["role"]: _row(row, runs[0]) for row in runs[0]["rows"] if is_reference(row)}
    report = Report(
        f"sweep of {len(runs)} run{'s' * (len(runs) > 1)}{'' if out == shared else _of_what(runs[0])}",
        [*references.values(), *_swept(runs).values()],
        references.get("pretrained"),
        references.get("experts"),
        command=runs[0]["command"],
        repeat=_each_again(runs, folders, shared),
        curves=_curves(runs),
        seeds={name: [Row(name, scores) for scores in several] for name, several in by_seed(runs).items()},
    )
    out.mkdir(parents=True, exist_ok=True)
    write(report, out)
    return Summary(report, out)


def _of_what(run: Mapping[str, Any]) -> str:
    """The pools of a run, in words."""
    names = [run["config"].get("choices", {}).get(group) for group in ("modelpool", "taskpool")]
    return f": {' on '.join(map(str, filter(None, names)))}"


def knobs_that_differ(run: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> str:
    """The knobs in which runs of this method differ, and for a repair's row those of the repair: "knob=value …"."""
    return " ".join(f"{knob}={value}" for knob, value in _differing_of(run, runs, row).items())


def curves_of(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[list[float]]]]:
    """Mean accuracy over each numeric knob that alone took several values, as in report.json."""
    swept = _curves(runs).items()
    return {knob: {name: [list(p) for p in curve.items()] for name, curve in curves.items()} for knob, curves in swept}


def _each_again(runs: Sequence[Mapping[str, Any]], folders: Sequence[Path], shared: Path) -> str:
    """A line for each run, which repeats it from inside the folder of the sweep."""
    lines = zip(folders, runs, strict=True)
    own = [f"(cd {quote(str(folder.relative_to(shared)))} && {run['repeat']})" for folder, run in lines]
    return "\n".join(own) if all(run["repeat"] for run in runs) else ""


def _row(data: Mapping[str, Any], run: Mapping[str, Any], name: str | None = None) -> Row:
    kind = {key: data[key] for key in ("role", "merge", "repair", "routed")}
    kind |= {key: data[key] for key in _FACTS if key in data}
    cost = {key: run[key].get(data["name"]) for key in ("seconds", "memory")}
    names = {task: each["name"] for task, each in run.get("metrics", {}).items() if task in data["accuracies"]}
    language = {"metrics": names, "errors": data.get("errors", {})}
    return Row(name or data["name"], data["accuracies"], run["samples"], **cost, **kind, **language)


def _swept(runs: Sequence[Mapping[str, Any]]) -> dict[str, Row]:
    """The rows of all runs, without the references; rows that several runs have in common appear once."""
    rows: dict[str, Row] = {}
    for run in runs:
        for data in run["rows"]:
            if not is_reference(data):
                name = f"{data['name']} {knobs_that_differ(run, runs, data)}".strip()
                rows.setdefault(name, _row(data, run, name))
    return rows


def _differing_of(run: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> dict[str, Any]:
    groups = ("method", "repair") if row["role"] == "repair" else ("method",)
    return {k: v for group in groups for k, v in _differing(run, runs, group).items()}


def _differing(run: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], group: str) -> dict[str, Any]:
    """The knobs of a group in which runs differ; none for a run of several methods, whose knobs fit no single row."""
    own, kind = run["config"].get(group), "name" if group == "method" else "kind"
    if not isinstance(own, Mapping):
        return {}
    others = [r["config"][group] for r in runs if isinstance(r["config"].get(group), Mapping)]
    peers = [other for other in others if other.get(kind) == own.get(kind)]
    knobs, several = dict(flat(own)), [dict(flat(peer)) for peer in peers]
    return {knob: value for knob, value in knobs.items() if len({str(peer.get(knob)) for peer in several}) > 1}


def _curves(runs: Sequence[Mapping[str, Any]]) -> Curves:
    curves: Curves = {}
    for run in runs:
        for data in run["rows"]:
            differing = _differing_of(run, runs, data)
            if not is_reference(data) and len(differing) == 1 and data["mean"] is not None:
                knob, value = next(iter(differing.items()))
                if isinstance(value, int | float) and not isinstance(value, bool):
                    curves.setdefault(knob, {}).setdefault(data["name"], {})[value] = data["mean"]
    several = {k: {n: dict(sorted(c.items())) for n, c in cs.items() if len(c) > 1} for k, cs in curves.items()}
    return {knob: swept for knob, swept in several.items() if swept}
