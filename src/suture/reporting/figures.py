"""The figures of a run: each is drawn on the page and saved as PNG and SVG, from one specification.

A figure is one function in a file of `charts/`; its decorator says everything else.
"""

import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

from suture.reporting import charts
from suture.reporting.chart import Chart
from suture.reporting.labels import file_name
from suture.reporting.rendering import save
from suture.reporting.run_folder import Finished

#: The first sections of the page, in their order; others come behind them.
_SECTIONS = ("Task by task", "Sweeps", "Every model on every task", "Coefficients", "Repair")
_OF_MODELS = ("learning", "repairs")  # parts of report.json that go by the names of models


@dataclass(frozen=True)
class Figure:
    """A kind of figure.

    `draw(run)` gives the chart, or None where the run has nothing for it. With `each`, a key of report.json such as
    "learning", `draw(run, name)` is called for every name in there.
    """

    name: str
    section: str
    draw: Callable[..., Chart | None]
    each: str = ""


@dataclass(frozen=True)
class Drawn:
    """A chart of a run: `file` is its name without suffix, `model` the one that it is of, if it is of one."""

    section: str
    model: str
    file: str
    chart: Chart


def figure(name: str, *, section: str, each: str = "") -> Callable[[Callable[..., Chart | None]], Figure]:
    """Make a function of `charts/` the figure that is saved as NAME.png, or NAME_MODEL.png with `each`."""
    return lambda draw: Figure(name, section, draw, each)


@cache
def figures() -> list[Figure]:
    """All figures, in the order of the page: by section, then as they come in their files."""
    modules = sorted(module.name for module in pkgutil.iter_modules(charts.__path__))
    members = [vars(import_module(f"{charts.__name__}.{module}")).values() for module in modules]
    defined = [member for module in members for member in module if isinstance(member, Figure)]
    order = {section: i for i, section in enumerate(_SECTIONS)}
    return sorted(defined, key=lambda one: order.get(one.section, len(order)))


def charts_of(run: Finished) -> Iterator[Drawn]:
    """Every chart that the run has data for."""
    for one in figures():
        if not one.each and (chart := one.draw(run)):
            yield Drawn(one.section, "", one.name, chart)
        for name in run.data.get(one.each, ()):
            if chart := one.draw(run, name):
                yield Drawn(one.section, name if one.each in _OF_MODELS else "", file_name(one.name, name), chart)


def draw(run: Finished, folder: Path) -> list[Path]:
    """Save every figure of a run; returns the SVG files, whose PNG twins lie beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    return [save(drawn.chart, folder / drawn.file, drawn.model) for drawn in charts_of(run)]
