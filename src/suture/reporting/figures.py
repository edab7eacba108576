"""The figures of a run, drawn on the page and saved as PNG and SVG from one specification each.

A figure is one function in a file of `charts/`, with the decorator `figure`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from suture.core.discovery import import_all
from suture.errors import check_known
from suture.reporting.chart import Chart
from suture.reporting.labels import file_name
from suture.reporting.run_folder import FinishedRun, read

#: The first sections of the page, in order; any others follow.
_SECTIONS = ("Task by task", "Sweeps", "Every model on every task", "Search", "Coefficients", "Repair")
_OF_MODELS = ("learning", "repairs")  # parts of report.json whose keys are names of models


@dataclass(frozen=True)
class Figure:
    """A kind of figure.

    `draw(run)` returns the chart, or None if the run has no data for it. With `each`, a key of report.json such as
    "learning", `draw(run, name)` is called for every name under that key.
    """

    name: str
    section: str
    draw: Callable[..., Chart | None]
    each: str = ""


@dataclass(frozen=True)
class Drawn:
    """A chart of a run: `file` is its name without suffix, and `model` the model that it shows, if it is only one."""

    section: str
    model: str
    file: str
    chart: Chart


def figure(name: str, *, section: str, each: str = "") -> Callable[[Callable[..., Chart | None]], Figure]:
    """Make a function of `charts/` a figure, saved as NAME.png, or with `each` as NAME_MODEL.png."""
    return lambda draw: Figure(name, section, draw, each)


@cache
def figures() -> list[Figure]:
    """All figures in the order of the page: by section, then by file and position in it."""
    members = [vars(module).values() for module in import_all("suture.reporting.charts")]
    defined = [member for module in members for member in module if isinstance(member, Figure)]
    order = {section: i for i, section in enumerate(_SECTIONS)}
    return sorted(defined, key=lambda one: order.get(one.section, len(order)))


def charts_of(run: FinishedRun) -> Iterator[Drawn]:
    """Every chart for which the run has data."""
    for one in figures():
        if not one.each and (chart := one.draw(run)):
            yield Drawn(one.section, "", one.name, chart)
        for name in run.data.get(one.each, ()):
            if chart := one.draw(run, name):
                yield Drawn(one.section, name if one.each in _OF_MODELS else "", file_name(one.name, name), chart)


def chart_of_run(folder: Path, name: str) -> Chart:
    """The figure of a finished run with this file name, without suffix; raises `ConfigError` with the names it has."""
    drawn = {one.file: one.chart for one in charts_of(read(folder))}
    check_known("figure", [name], drawn)
    return drawn[name]


def draw(run: FinishedRun, folder: Path) -> list[Path]:
    """Save every figure of a run as SVG and PNG; returns the paths of the SVG files."""
    folder.mkdir(parents=True, exist_ok=True)
    return [drawn.chart.save(folder / drawn.file, drawn.model) for drawn in charts_of(run)]
