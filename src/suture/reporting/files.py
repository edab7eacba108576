"""Writing the files of a report: report.json, figures.json, report.md, report.html and the figures."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from suture.reporting.data import Report, about_scores
from suture.reporting.figures import draw
from suture.reporting.harms import harms
from suture.reporting.page import page
from suture.reporting.paths import without_machine
from suture.reporting.points import points_of
from suture.reporting.run_folder import read
from suture.reporting.tables import as_csv, as_latex, as_markdown
from suture.storage.atomic import disk_errors

_ABOUT = (
    "Accuracy in %, in brackets the 95% interval of the mean. Norm.: mean over tasks of accuracy / expert accuracy."
)


def write(report: Report, folder: Path, *, interactive: bool = True) -> None:
    """Write every form of the report into an existing folder; raises `OutputError` if it cannot be written.

    The figures and the page are made from the written report.json and figures.json, just as `suture report` does later.
    """
    with disk_errors(folder):
        data, points = _finite(report.as_data()), _finite(points_of(report))
        (folder / "report.json").write_text(json.dumps(data, indent=2, default=str) + "\n", "utf-8")
        (folder / "figures.json").write_text(json.dumps(points, separators=(",", ":")) + "\n", "utf-8")
        run = read(folder)
        pictures = draw(run, folder / "figures")
        (folder / "report.md").write_text(_markdown(run.data, pictures), "utf-8")
        for name, text in {"table.csv": as_csv, "table.tex": as_latex}.items():
            (folder / name).write_text(text(run.data), "utf-8")
        html = page(replace(run, pictures=sorted(pictures)), interactive=interactive)
        (folder / "report.html").write_text(html, "utf-8")


def _finite(value: Any) -> Any:
    """The data with None for numbers that are not finite, which JSON cannot represent."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _markdown(data: Mapping[str, Any], figures: Sequence[Path]) -> str:
    counts = ", ".join(f"{task} {count:,}" for task, count in data["samples"].items())
    pictures = [f"![{figure.stem}](figures/{figure.with_suffix('.png').name})" for figure in figures]
    parts = [f"# {data['title']}", as_markdown(data).strip(), _about(data)]
    parts += [f"Test inputs: {counts}."] if counts else []
    notes = [*harms(data), *data["notes"]]
    parts += ["\n".join(f"- {without_machine(note)}" for note in dict.fromkeys(notes))] if notes else []
    parts += pictures
    profile = [_line(["activity", "seconds"]), _line(["---", "---:"])]
    profile += [_line([activity, f"{seconds:.2f}"]) for activity, seconds in data["profile_seconds"].items()]
    command = data["repeat"] or without_machine(data["command"])
    where = "To repeat it, in this folder:\n\n" if data["repeat"] else ""
    parts += ["\n".join(profile)] + ([f"{where}```\n{command}\n```"] if command else [])
    return "\n\n".join(parts) + "\n"


def _about(data: Mapping[str, Any]) -> str:
    named = {task: each["name"] for task, each in data.get("metrics", {}).items()}
    return about_scores(data["tasks"], named) if named else _ABOUT


def _line(values: list[str]) -> str:
    return f"| {' | '.join(values)} |"
