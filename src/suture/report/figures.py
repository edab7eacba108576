"""The figures of a report, each as PNG and SVG. The only room that knows matplotlib."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from suture.report.contents import Learning, Report

_COLOURS = ("#9aa5b1", "#3e4c59", "#2f6f9f", "#d9822b", "#3f9c6b", "#a154a1", "#c44536", "#5c6ac4")


def draw(report: Report, folder: Path) -> list[Path]:
    """Draw what the report has data for; returns the SVG files, whose PNG twins lie beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    if report.tasks:
        drawn.append(_save(folder / "accuracy", _accuracy, report, width=2.2 + 0.9 * len(report.tasks)))
    if report.curves:
        drawn.append(_save(folder / "accuracy_over_scaling_factor", _curves, report))
    for name, learning in report.learning.items():
        drawn += _draw_learning(name, learning, folder)
    return drawn


def _draw_learning(name: str, learning: Learning, folder: Path) -> list[Path]:
    drawn = []
    if len(learning.losses):
        drawn.append(_save(folder / f"coefficients_over_steps_{name}", _coefficients_over_steps, learning))
        drawn.append(_save(folder / f"objective_over_steps_{name}", _objective_over_steps, learning))
    if learning.scores:
        drawn.append(_save(folder / f"accuracy_over_steps_{name}", _accuracy_over_steps, learning))
    if learning.layers is not None:
        size = {"width": 2.6 + 0.5 * len(learning.tasks), "height": 1.4 + 0.11 * len(learning.layers)}
        drawn.append(_save(folder / f"coefficients_{name}", _coefficients, learning, **size))
    return drawn


def _save(stem: Path, paint: Callable[[Any, Any], None], content: Any, width: float = 6.0, height: float = 3.6) -> Path:
    with _figure(width, height) as (figure, axes):
        paint(axes, content)
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


def _points(curve: Mapping[Any, float]) -> tuple[list[float], list[float]]:
    return list(curve), [100 * value for value in curve.values()]


def _coefficients_over_steps(axes, learning: Learning) -> None:
    """One line a task; for several layers their mean, with the range from the lowest to the highest behind it."""
    history = (learning.history if learning.layers else learning.history[..., None]).numpy()
    steps = range(len(history))
    for i, task in enumerate(learning.tasks):
        colour, values = _COLOURS[i % len(_COLOURS)], history[:, i]
        axes.plot(steps, values.mean(1), label=task, color=colour, linewidth=1.4)
        if learning.layers:
            axes.fill_between(steps, values.min(1), values.max(1), color=colour, alpha=0.08, linewidth=0)
    axes.set_xlabel("step")
    axes.set_ylabel("coefficient" + (", mean and range over layers" if learning.layers else ""))
    axes.figure.legend(loc="outside upper center", ncols=4, frameon=False)


def _objective_over_steps(axes, learning: Learning) -> None:
    """The objective of every batch, and its running mean."""
    losses = learning.losses
    window = max(1, len(losses) // 20)
    axes.plot(range(len(losses)), losses.numpy(), color=_COLOURS[0], linewidth=0.7, label="one batch a task")
    mean = losses.unfold(0, window, 1).mean(1)
    axes.plot(
        range(window - 1, len(losses)), mean.numpy(), color=_COLOURS[2], linewidth=1.6, label=f"mean of {window} steps"
    )
    axes.set_xlabel("step")
    axes.set_ylabel("objective, summed over tasks")
    axes.figure.legend(loc="outside upper center", ncols=2, frameon=False)


def _accuracy_over_steps(axes, learning: Learning) -> None:
    axes.plot(*_points(learning.scores), marker="o", markersize=3.5, color=_COLOURS[2])
    axes.set_xlabel("step")
    axes.set_ylabel("mean accuracy (%)")


def _coefficients(axes, learning: Learning) -> None:
    """Heat map, layers down and tasks across, white at the mean."""
    values = learning.coefficients.numpy()
    middle = values.mean()
    reach = max(abs(values - middle).max(), 1e-6)
    image = axes.imshow(values.T, aspect="auto", cmap="RdBu_r", vmin=middle - reach, vmax=middle + reach)
    axes.set_xticks(range(len(learning.tasks)), learning.tasks, rotation=40, ha="right")
    axes.set_yticks(range(len(learning.layers or ())), _short_names(learning.layers or ()), fontsize=5)
    axes.figure.colorbar(image, ax=axes, label="coefficient")


def _short_names(layers: Sequence[str]) -> list[str]:
    """Names without what they all begin with."""
    parts = [layer.split(".") for layer in layers]
    shared = next((i for i, level in enumerate(zip(*parts, strict=False)) if len(set(level)) > 1), 0)
    return [".".join(names[shared:]) for names in parts]
