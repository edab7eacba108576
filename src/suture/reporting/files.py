"""Writing the files of a report: report.json, figures.json, report.md, report.html and the figures."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from suture.reporting.data import COSTS, Report, about_scores, cells, columns, costs
from suture.reporting.figures import draw
from suture.reporting.page import page
from suture.reporting.points import points_of
from suture.reporting.run_folder import read
from suture.storage.atomic import disk_errors


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
        (folder / "report.md").write_text(_markdown(report, pictures), "utf-8")
        html = page(replace(run, pictures=sorted(pictures)), interactive=interactive)
        (folder / "report.html").write_text(html, "utf-8")


def _finite(value: Any) -> Any:
    """The data with None for numbers that are not finite, which JSON cannot represent."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _markdown(report: Report, figures: list[Path]) -> str:
    heads = columns(report)
    table = [
        _line([*heads, *COSTS]),
        _line(["---", *["---:"] * (len(heads) - 1), "---", "---", "---:"]),
        *(_line([*cells(report, r), *costs(asdict(r), r.seconds)]) for r in report.rows),
    ]
    counts = ", ".join(f"{task} {count}" for task, count in report.samples.items())
    pictures = [f"![{figure.stem}](figures/{figure.with_suffix('.png').name})" for figure in figures]
    parts = [
        f"# {report.title}",
        "\n".join(table),
        about_scores(report.metrics),
    ]
    parts += [f"Test samples: {counts}."] if counts else []
    parts += [f"- {note}" for note in report.notes] + pictures
    profile = [_line(["activity", "seconds"]), _line(["---", "---:"])]
    profile += [_line([activity, f"{seconds:.2f}"]) for activity, seconds in report.profile.items()]
    parts += ["\n".join(profile)] + ([f"```\n{report.command}\n```"] if report.command else [])
    return "\n\n".join(parts) + "\n"


def _line(values: list[str]) -> str:
    return f"| {' | '.join(values)} |"
