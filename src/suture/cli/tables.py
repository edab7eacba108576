"""Tables for people at a terminal; plain when standard output is not one."""

import math
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suture.analysis import Finding
from suture.core.names import in_bytes
from suture.evaluation import Row
from suture.pipeline.preflight import Preflight
from suture.pipeline.reproduce import Compared, Published
from suture.reporting.data import Report, cells, columns, score_text, unit_of
from suture.reporting.labels import end_label, label, short_names

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_WIDTHS = (16, 12, 10)  # of a model's column: the widest for which all models fit beside each other
_SAMPLES = "samples"
_TASKS_ACROSS = 8  # in the matrix
_LONGEST = 40  # rows of a finding
_WIDEST = 6  # columns of a finding beside the first


def print_run(result: Any) -> None:
    """A run's accuracies and folder; what a dry run found."""
    if isinstance(result, Preflight):
        print_preflight(result)
    elif result.unchanged:
        print(f"{result.folder} already holds the result of this run.")
    else:
        print_report(result.report)
        print(f"The report and all models are in {result.folder}")


def print_best(result: Any) -> None:
    """The point that a search found best, and its score."""
    values = " ".join(f"method.{knob}={value:.4g}" for knob, value in result.best.point.items())
    print(f"Best of {len(result.trials)} points: {values}, with a score of {result.best.score:.4g}.")


def print_row(row: Row) -> None:
    """One row of a table that is not finished: a model and its mean accuracy."""
    seconds = f"  {row.seconds:5.1f} s" if row.seconds else ""
    print(f"  {row.name.replace('_', ' '):<28}{100 * row.mean:5.1f} %{seconds}", flush=True)


def print_sweep(report: Report, folder: Path) -> None:
    """The accuracies of several runs in one table, and where its report is."""
    print_report(report)
    print(f"The report on all runs is in {folder}")


def print_report(report: Report) -> None:
    """The accuracy table, in percent, tasks down and models across; nothing without rows."""
    if not report.rows:
        return
    console = _console()
    error = ", ± standard error" * bool(report.metrics)
    error += "; ↓: less is better" * any("↓" in head for head in columns(report))
    caption = f"{unit_of(report.tasks, report.metrics)}{error}; norm.: relative to the experts"
    table = _table(title=report.title, caption=caption, padding=0, title_justify="left")
    if not _models_across(table, report, console.width):
        _models_down(table, report)
    console.print(table)
    if report.matrix:
        console.print("every model on every task" + ", accuracy in %" * (not report.metrics), style="italic")
        for start in range(0, len(report.tasks), _TASKS_ACROSS):
            console.print(_matrix(report, report.tasks[start : start + _TASKS_ACROSS]))
    for note in report.notes:
        console.print(f"note: {note}", highlight=False)


def _models_across(table: "Table", report: Report, width: int) -> bool:
    """Tasks down, with their numbers of samples if there is room for them; False if the models do not fit."""
    heads, body = columns(report), [cells(report, row) for row in report.rows]
    first, names = max(map(len, heads)), [line[0].replace("_", " ") for line in body]
    room = width - first - 3
    widths, counted = _fitting(names, room - len(_SAMPLES) - 1), True
    if widths is None:
        widths, counted = _fitting(names, room), False
    if widths is None:
        return False
    table.add_column("", min_width=first)
    for name, wide in zip(names, widths, strict=True):
        table.add_column(name, justify="right", overflow="fold", width=wide)
    if counted:
        table.add_column(_SAMPLES, justify="right", style="dim")
    for i, head in enumerate(heads[1:], start=1):
        if head == "mean":
            table.add_section()
        task = report.tasks[i - 1] if i <= len(report.tasks) else ""
        samples = [str(report.samples.get(task, ""))] if counted else []
        table.add_row(head, *(line[i] for line in body), *samples)
    return True


def _fitting(names: Sequence[str], room: int) -> list[int] | None:
    """Widths of columns that fit into so many letters; names take several lines, broken at spaces."""
    for most in _WIDTHS:
        widths = [max(6, min(most, max(map(len, name.split())))) for name in names]
        if sum(widths) + len(widths) <= room:
            return widths
    return None


def _models_down(table: "Table", report: Report) -> None:
    """Too many models for 80 columns: their summaries only; the report has every task."""
    for head in ("", *columns(report)[-3:]):
        table.add_column(head, justify="right" if head else "left")
    for row in report.rows:
        line = cells(report, row)
        table.add_row(line[0], *line[-3:])


def _matrix(report: Report, tasks: Sequence[str]) -> "Table":
    """Models down, some of the tasks across in the order of the table above; names are cut so that eight fit."""
    table = _table(padding=0)
    table.add_column("")
    for task in tasks:
        table.add_column(_cut(task, 7), justify="right")
    for row in report.matrix:
        table.add_row(_cut(row.name, 12), *(score_text(row.on(task), row.metrics.get(task)) for task in tasks))
    return table


def _cut(name: str, width: int) -> str:
    """Names begin alike and end alike: what is cut out is from between.

    >>> _cut("oxford_flowers102", 7)
    'oxfo…02'
    """
    start = (width - 1) * 2 // 3
    return name if len(name) <= width else f"{name[:start]}…{name[start - width + 1 :]}"


def print_preflight(found: Preflight) -> None:
    """Sizes, then notes, then problems; every line whole, whatever the width."""
    print(f"{found.tensors} tensors to merge, {found.parameters / 1e6:.1f} M parameters")
    print(f"reads {in_bytes(found.bytes_read)}, writes {in_bytes(found.bytes_written)}", end="")
    print(f", merging holds about {in_bytes(found.memory)} beside the result")
    if found.disk_free:
        print(f"free on disk {in_bytes(found.disk_free)}")
    for note in found.notes:
        print(f"note: {note}")
    head = "\x1b[31mproblem:\x1b[0m" if _in_colour() else "problem:"
    for problem in found.problems:
        print(head, problem)
    if not found.problems:
        print("everything fits")


def _in_colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def print_published(figures: Iterable[Published]) -> None:
    """Published figures, each with its tolerance and its command."""
    console = _console(soft_wrap=True, highlight=False)
    for figure in figures:
        console.print(figure.id, style="bold", end="")
        console.print(f"  {figure.mean:.1f} ± {figure.tolerance:.1f} %  ({figure.row})")
        console.print(f"    {figure.command}")


def print_compared(found: Iterable[Compared]) -> None:
    """A run's figures beside the published ones."""
    table = _table(padding=(0, 1, 0, 0), caption="mean accuracy in %")
    for head in ("", "published", "this run", "tolerance", ""):
        table.add_column(head, justify="right" if head else "left")
    for one in found:
        figure, said = one.published, "within" if one.within else "outside"
        table.add_row(figure.id, f"{figure.mean:.1f}", f"{one.found:.1f}", f"{figure.tolerance:.1f}", said)
    _console().print(table)


def print_finding(found: Finding) -> None:
    """The table in at most 80 columns and 40 rows; files have all of it."""
    console, shown = _console(), min(len(found.heads), _WIDEST + 1)
    table = _table(title=found.title, padding=(0, 1, 0, 0), title_justify="left")
    for i, head in enumerate(found.heads[:shown]):
        text = isinstance(found.rows[0][i], str)
        table.add_column(label(head, 30), justify="left" if text else "right", overflow="ellipsis", no_wrap=text)
    names = short_names([row[0] for row in found.rows]) if isinstance(found.rows[0][0], str) else None
    for i, row in enumerate(found.rows[:_LONGEST]):
        cells = [names[i] if names else _cell(row[0]), *map(_cell, row[1:shown])]
        table.add_row(*(end_label(cell, 30) if j == 0 else cell for j, cell in enumerate(cells)))
    console.print(table)
    left = [(len(found.rows) - _LONGEST, "rows"), (len(found.heads) - shown, "columns")]
    for line in [*found.notes, *(f"{count} more {what} in the files" for count, what in left if count > 0)]:
        console.print(f"note: {line}", highlight=False)


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return "–" if not math.isfinite(value) else f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"


def _console(**how: Any) -> "Console":
    """Prints text as it is: names and remedies may have brackets, as 'suture[data]' does."""
    from rich.console import Console

    return Console(markup=False, **how)


def _table(**how: Any) -> "Table":
    from rich.box import SIMPLE
    from rich.table import Table

    return Table(box=SIMPLE, **how)
