"""report.json, figures.json, report.md, report.html and the figures, written into the folder of a run."""

import json
from pathlib import Path

from suture.reporting.data import Report, cells, columns
from suture.reporting.figures import draw
from suture.reporting.page import page
from suture.reporting.points import points_of
from suture.reporting.run_folder import read


def write(report: Report, folder: Path, *, interactive: bool = True) -> None:
    """Write every form of the report into an existing folder."""
    figures = draw(report, folder / "figures")
    (folder / "report.json").write_text(json.dumps(report.as_data(), indent=2, default=str) + "\n", "utf-8")
    (folder / "figures.json").write_text(json.dumps(points_of(report), separators=(",", ":")) + "\n", "utf-8")
    (folder / "report.md").write_text(_markdown(report, figures), "utf-8")
    (folder / "report.html").write_text(page(read(folder), interactive=interactive), "utf-8")


def _markdown(report: Report, figures: list[Path]) -> str:
    line = lambda values: f"| {' | '.join(values)} |"
    heads = columns(report)
    table = [
        line(heads),
        line(["---", *["---:"] * (len(heads) - 1)]),
        *(line(cells(report, r)) for r in report.rows),
    ]
    counts = ", ".join(f"{task} {count}" for task, count in report.samples.items())
    pictures = [f"![{figure.stem}](figures/{figure.with_suffix('.png').name})" for figure in figures]
    parts = [
        f"# {report.title}",
        "\n".join(table),
        "Accuracy in %. Norm.: mean over tasks of accuracy / expert accuracy.",
    ]
    parts += [f"Test samples: {counts}."] if counts else []
    parts += [f"- {note}" for note in report.notes] + pictures
    profile = [line(["activity", "seconds"]), line(["---", "---:"])]
    profile += [line([activity, f"{seconds:.2f}"]) for activity, seconds in report.profile.items()]
    parts += ["\n".join(profile)] + ([f"```\n{report.command}\n```"] if report.command else [])
    return "\n\n".join(parts) + "\n"
