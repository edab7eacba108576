"""The figures of a report, each as PNG and SVG. The only room that knows matplotlib."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from suture.report.contents import Report

_COLOURS = ("#9aa5b1", "#3e4c59", "#2f6f9f", "#d9822b", "#3f9c6b", "#a154a1", "#c44536", "#5c6ac4")


def draw(report: Report, folder: Path) -> list[Path]:
    """Draw what the report has data for; returns the SVG files, whose PNG twins lie beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    if report.tasks:
        drawn.append(_save(folder / "accuracy", _accuracy, report, width=2.2 + 0.9 * len(report.tasks)))
    if report.curves:
        drawn.append(_save(folder / "accuracy_over_scaling_factor", _curves, report, width=6.0))
    return drawn


def _save(stem: Path, paint, report: Report, width: float) -> Path:
    with _figure(width, 3.6) as (figure, axes):
        paint(axes, report)
        figure.savefig(stem.with_suffix(".png"), dpi=140)
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
    return stem.with_suffix(".svg")


@contextmanager
def _figure(width: float, height: float) -> Iterator[tuple[Any, Any]]:
    """Axes on a figure that no window system and no global state of matplotlib knows of."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(
        {"svg.hashsalt": "suture", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots()


def _accuracy(axes, report: Report) -> None:
    """Bars per task and for the mean, one colour a model."""
    groups = [*report.tasks, "mean"]
    width = 0.8 / len(report.rows)
    for i, row in enumerate(report.rows):
        heights = [100 * row.accuracies.get(task, float("nan")) for task in report.tasks] + [100 * row.mean]
        places = [g + (i - (len(report.rows) - 1) / 2) * width for g in range(len(groups))]
        axes.bar(places, heights, width * 0.92, label=row.name, color=_COLOURS[i % len(_COLOURS)])
    axes.set_xticks(range(len(groups)), groups, rotation=20, ha="right")
    axes.set_ylabel("accuracy (%)")
    axes.set_ylim(0, 100)
    axes.figure.legend(loc="outside upper center", ncols=min(5, len(report.rows)), frameon=False)


def _curves(axes, report: Report) -> None:
    """Mean accuracy against the scaling factor, with pretrained and experts as lines to compare with."""
    for i, (name, curve) in enumerate(report.curves.items()):
        axes.plot(*_points(curve), marker="o", markersize=3.5, label=name, color=_COLOURS[(i + 2) % len(_COLOURS)])
    for row, style in ((report.pretrained, ":"), (report.experts, "--")):
        if row is not None:
            axes.axhline(100 * row.mean, linestyle=style, color=_COLOURS[1], linewidth=1, label=row.name)
    axes.set_xlabel("scaling factor λ")
    axes.set_ylabel("mean accuracy (%)")
    axes.figure.legend(loc="outside upper center", ncols=4, frameon=False)


def _points(curve: Mapping[float, float]) -> tuple[list[float], list[float]]:
    return list(curve), [100 * value for value in curve.values()]
