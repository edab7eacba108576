"""Comparison of finished runs: one page with all rows in one table, and selectors for each run's charts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from suture.errors import ConfigError
from suture.reporting.page import page
from suture.reporting.run_folder import FinishedRun, is_reference, read, read_all
from suture.reporting.seeds import by_seed
from suture.reporting.sweep import curves_of, knobs_that_differ
from suture.storage.atomic import write_text

_BY_ROW = ("learning", "repairs", "seconds", "memory")
_OF_A_MODEL = ("learning", "objective", "scatter", "explained")


def compare(folders: Sequence[Path], output: str | Path | None, *, interactive: bool) -> Path:
    """Write the page of one finished run again, or one page of several; see `suture.report`."""
    if not folders:
        raise ConfigError("There is nothing to report on. Wanted: suture report RUN [RUN …], folders of finished runs.")
    single = len(folders) == 1
    path = Path(output) if output else folders[0] / "report.html" if single else Path("comparison.html")
    run = read(folders[0]) if single else compared(read_all(folders))
    if not path.parent.is_dir():
        raise ConfigError(f"'{path.parent}' is no folder. Remedy: make it, or choose another --output.")
    write_text(path, page(run, interactive=interactive))
    return path


def compared(runs: Sequence[FinishedRun]) -> FinishedRun:
    """The data of several runs as those of one; rows that they have in common appear once."""
    _refuse_other_tasks(runs)
    names = _names(runs)
    merged = {key: _joined(runs, names, lambda run, key=key: run.data.get(key, {})) for key in _BY_ROW}
    points = {key: _joined(runs, names, lambda run, key=key: run.points.get(key, {})) for key in _OF_A_MODEL}
    data = {
        "title": f"{len(runs)} runs compared",
        "tasks": runs[0].data["tasks"],
        "samples": runs[0].data["samples"],
        "metrics": runs[0].data.get("metrics", {}),
        "rows": [dict(row, name=names[i][row["name"]]) for i, row in _different_rows(runs, names)],
        "curves": curves_of([run.data for run in runs]),
        "matrix": {name: row for run in runs for name, row in run.data.get("matrix", {}).items()},
        "notes": list(dict.fromkeys(note for run in runs for note in run.data.get("notes", ()))),
        "search": None,
        "seeds": by_seed([run.data for run in runs]),
        "runs": [{**run.data, "label": run.label} for run in runs],
        **merged,
    }
    return FinishedRun(data["title"], data, points, [picture for run in runs for picture in run.pictures])


def _names(runs: Sequence[FinishedRun]) -> list[dict[str, str]]:
    """For each run, row → its name in the comparison: with the knobs that differ, and the run's label if needed."""
    datas = [run.data for run in runs]
    accuracies: dict[str, Any] = {}
    names: list[dict[str, str]] = []
    for run in runs:
        names.append({})
        for row in run.data["rows"]:
            knobs = "" if is_reference(row) else knobs_that_differ(run.data, datas, row)
            name = f"{row['name']} {knobs}".strip()
            if accuracies.setdefault(name, row["accuracies"]) != row["accuracies"]:
                name = f"{name} ({run.label})"
            names[-1][row["name"]] = name
    return names


def _different_rows(
    runs: Sequence[FinishedRun], names: Sequence[Mapping[str, str]]
) -> list[tuple[int, Mapping[str, Any]]]:
    """(number of the run, row) for every different row, the references first."""
    rows: dict[str, tuple[int, Mapping[str, Any]]] = {}
    for i, run in enumerate(runs):
        for row in run.data["rows"]:
            rows.setdefault(names[i][row["name"]], (i, row))
    return sorted(rows.values(), key=lambda numbered: not is_reference(numbered[1]))


def _joined(runs: Sequence[FinishedRun], names: Sequence[Mapping[str, str]], part: Any) -> dict[str, Any]:
    return {names[i].get(name, name): value for i, run in enumerate(runs) for name, value in part(run).items()}


def _refuse_other_tasks(runs: Sequence[FinishedRun]) -> None:
    first = runs[0]
    for run in runs[1:]:
        if run.data["tasks"] != first.data["tasks"]:
            one, other = (", ".join(r.data["tasks"]) or "no task" for r in (first, run))
            raise ConfigError(
                f"'{run.label}' was scored on {other}, but '{first.label}' on {one}. "
                "Remedy: compare runs of one task pool, in its order."
            )
