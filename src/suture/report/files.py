"""report.json, report.md, report.html and the figures, written into the folder of a run."""

import base64
import json
from html import escape
from pathlib import Path

from suture.report.contents import Report, cells, columns
from suture.report.figures import draw

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .5rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; background: #fff; border-radius: 6px; }
pre { overflow-x: auto; background: var(--soft); padding: .8rem; border-radius: 6px; }
"""


def write(report: Report, folder: Path) -> None:
    """Write every form of the report into an existing folder."""
    figures = draw(report, folder / "figures")
    (folder / "report.json").write_text(json.dumps(report.as_data(), indent=2, default=str) + "\n", "utf-8")
    (folder / "report.md").write_text(_markdown(report, figures), "utf-8")
    (folder / "report.html").write_text(_page(report, figures), "utf-8")


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


def _page(report: Report, figures: list[Path]) -> str:
    """One self-contained page; the figures travel inside it."""
    pictures = "\n".join(
        f'<p><img alt="{figure.stem.replace("_", " ")}" src="data:image/svg+xml;base64,'
        f'{base64.b64encode(figure.read_bytes()).decode()}"></p>'
        for figure in figures
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    rows = "".join(f"<tr><td>{escape(a)}</td><td>{s:.2f}</td></tr>" for a, s in report.profile.items())
    details = escape(json.dumps({"config": report.config, "provenance": report.provenance}, indent=2, default=str))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(report.title)}</title><style>{_STYLE}</style></head><body>
<h1>{escape(report.title)}</h1>
<div class="wide">{_table(report)}</div>
<p>Accuracy in %. Norm.: mean over tasks of accuracy / expert accuracy. Gap closed: (model − pretrained) / (experts −
pretrained) of the means.</p>
{f"<ul>{notes}</ul>" if notes else ""}
{pictures}
<h2>Where the time went</h2><table><tr><th>activity</th><th>seconds</th></tr>{rows}</table>
<h2>To repeat it</h2><pre>{escape(report.command)}</pre>
<details><summary>Configuration and provenance</summary><pre>{details}</pre></details>
</body></html>
"""


def _table(report: Report) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in columns(report))
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells(report, row)) + "</tr>" for row in report.rows
    )
    counts = "".join(f"<td>{report.samples.get(task, '')}</td>" for task in report.tasks)
    return f"<table><tr>{head}</tr>{body}<tr><td>samples</td>{counts}<td></td><td></td><td></td></tr></table>"
