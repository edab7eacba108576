"""The accuracy table as CSV, LaTeX and Markdown, from the data of a finished run."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from suture.reporting.data import COSTS, costs, percent, score_text
from suture.reporting.run_folder import is_reference
from suture.reporting.scores import interval, top_names

Data = Mapping[str, Any]
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {sign: f"\\{sign}" for sign in "&%$#_{}"}
HEADS = ("mean", "learned from", "norm.", "gap closed")


def tables(data: Data) -> dict[str, str]:
    """Format → the table as text; nothing without rows."""
    makers = {"CSV": as_csv, "LaTeX": as_latex, "Markdown": as_markdown}
    return {name: make(data) for name, make in makers.items()} if data["rows"] else {}


def as_csv(data: Data) -> str:
    """Every number in full: accuracies in [0, 1] with their 95% intervals, and the cost of each row."""
    tasks = [*data["tasks"], "mean"]
    heads = [head for task in tasks for head in (task, f"{task} low", f"{task} high")]
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    end = ["normalised mean", "gap closed", "learned from", "task's name", "learned", "added parameters"]
    end += ["seconds", "memory in bytes"]
    writer.writerow(["model", *heads, *end])
    for row in data["rows"]:
        values = [row["accuracies"].get(task) for task in data["tasks"]] + [row["mean"]]
        bounds = [interval(data, row, task) or (None, None) for task in tasks]
        cells = [cell for value, pair in zip(values, bounds, strict=True) for cell in (value, *pair)]
        named, learned = costs(data, row)[:2]
        cost = [row["split"], named.strip("–"), learned.strip("–"), row["added_parameters"]]
        cost += [data[key].get(row["name"]) for key in ("seconds", "memory")]
        ends = [row["normalised_mean"], row["gap_closed"], *cost]
        writer.writerow(["" if cell is None else cell for cell in [row["name"], *cells, *ends]])
    return file.getvalue()


def as_latex(data: Data) -> str:
    """A tabular of booktabs, in percent; bold is what is not told apart from the best merge or repair of a column."""
    top, tasks = top_names(data), [*data["tasks"], "mean"]
    heads = ["model", *data["tasks"], "mean", "gap closed"]
    lines = [f"\\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}", r"\toprule", _latex_line(map(escaped, heads))]
    lines.append(r"\midrule")
    for number, row in enumerate(data["rows"]):
        if number and is_reference(data["rows"][number - 1]) and not is_reference(row):
            lines.append(r"\midrule")
        cells = [_bold(escaped(_text(data, row, task)), row["name"] in top[task]) for task in tasks]
        lines.append(_latex_line([escaped(row["name"]), *cells, percent(row["gap_closed"])]))
    unit = "Shares" if data.get("metrics") else "Accuracy"
    note = f"% {unit} in %. Bold: 95% intervals overlap with that of the best merge or repair. Needs booktabs."
    return "\n".join([note, *lines, r"\bottomrule", r"\end{tabular}"]).replace("–", "--") + "\n"


def as_markdown(data: Data) -> str:
    """The table of report.md: percent, with the interval of the mean."""
    heads = ["", *data["tasks"], *HEADS, *COSTS]
    align = ["---", *["---:"] * (len(data["tasks"]) + 1), "---", "---:", "---:", "---", "---", "---:", "---:", "---:"]
    return (
        "\n".join(_pipes(line) for line in [heads, align, *(_markdown_row(data, row) for row in data["rows"])]) + "\n"
    )


def escaped(text: str) -> str:
    """The text for LaTeX.

    >>> escaped("a_b & 50%")
    'a\\\\_b \\\\& 50\\\\%'
    """
    return "".join(_LATEX.get(letter, letter) for letter in " ".join(text.split()))


def mean_cell(data: Data, row: Data) -> str:
    """The mean in percent, with its interval in brackets if that is known."""
    bounds = interval(data, row, "mean")
    return _text(data, row, "mean") + ("" if bounds is None else f" ({_range(bounds)})")


def _text(data: Data, row: Data, task: str) -> str:
    """A score, or the mean, in its unit."""
    names = {name: each["name"] for name, each in data.get("metrics", {}).items()}
    if task == "mean":
        return score_text(row["mean"], next(iter(names.values()), None))
    return score_text(row["accuracies"].get(task), names.get(task), row.get("errors", {}).get(task))


def _range(bounds: Sequence[float]) -> str:
    return "–".join(map(percent, bounds))


def _markdown_row(data: Data, row: Data) -> list[str]:
    accuracies = [_text(data, row, task) for task in data["tasks"]]
    shares = [row["split"] or "–", percent(row["normalised_mean"]), percent(row["gap_closed"])]
    return [row["name"], *accuracies, mean_cell(data, row), *shares, *costs(data, row)]


def _pipes(cells: Sequence[str]) -> str:
    return f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in cells)} |"


def _latex_line(cells: Any) -> str:
    return f"{' & '.join(cells)} \\\\"


def _bold(text: str, bold: bool) -> str:
    return rf"\textbf{{{text}}}" if bold else text
