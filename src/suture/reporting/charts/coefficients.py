"""Learned coefficients over steps and by layer and task, with the objective and accuracy over steps."""

from collections.abc import Mapping
from typing import Any

from suture.core.names import sort_key
from suture.reporting.chart import (
    PALETTE,
    Chart,
    coloured,
    dash_names,
    dashed,
    heat_map,
    line,
    names_across,
    names_down,
    number,
    specification,
    task_colours,
    tip,
)
from suture.reporting.figures import figure
from suture.reporting.labels import short_names
from suture.reporting.run_folder import FinishedRun

_MANY = 8  # with more tasks, bands and dots cover each other: a band is drawn for the task that is picked
_LEAST_SPAN = 2  # points of accuracy on an axis: less would show noise as a trend
_DOTTED = 60  # curves of at most so many steps show a dot for each


@figure("coefficients_over_steps", section="Coefficients", each="learning")
def over_steps(run: FinishedRun, name: str) -> Chart | None:
    """One line per task; for several layers their mean, on a band from the lowest to the highest."""
    curves, layers = run.points.get("learning", {}).get(name, {}), run.data["learning"][name]["layers"]
    if len(curves.get("steps", ())) < 2:
        return None
    rows = [
        {"step": step, "task": task, **{side: curves[side][task][i] for side in ("mean", "low", "high")}}
        for task in curves["mean"]
        for i, step in enumerate(curves["steps"])
    ]
    palette = task_colours([*run.data["tasks"], *curves["mean"]])
    legend = {task: palette[task] for task in curves["mean"]}
    y = number("mean", "coefficient" + (", mean and range over layers" if layers else ""))
    tips = [tip("task", "nominal"), tip("step"), *(tip(side, format=".3f") for side in ("mean", "low", "high"))]
    many = len(legend) > _MANY
    ranges = {"y": {**y, "field": "low"}, "y2": {"field": "high"}}
    shades = coloured("task", legend, faint=0, full=0.3, unpicked=0 if many else min(0.1, 0.4 / len(legend)))
    band = {"mark": "area", "encoding": {**ranges, **shades}}
    dots = {"size": 14, "filled": True} if len(curves["steps"]) <= _DOTTED and not many else False
    curve: dict[str, Any] = {"mark": {"type": "line", "point": dots}}
    curve["encoding"] = {"y": y, "tooltip": tips, **coloured("task", legend), **dashed("task", legend)}
    marks = [*([band] if layers else []), curve]
    spec = specification(rows, layer=marks, encoding={"x": number("step", "step", tickMinStep=1)}, height=260)
    return Chart("Coefficients over steps", spec, legend, dashes=dash_names(legend))


@figure("coefficients", section="Coefficients", each="learning")
def by_layer(run: FinishedRun, name: str) -> Chart | None:
    """A heat map of layers and tasks, white at the mean, or bars if each task has one coefficient."""
    learned = run.data["learning"][name]
    if not learned["layers"]:
        return _by_task(learned, task_colours([*run.data["tasks"], *learned["tasks"]]))
    layers, tasks = short_names(learned["layers"]), learned["tasks"]
    rows = [
        {"layer": layer, "task": task, "value": learned["coefficients"][t][i]}
        for i, layer in enumerate(layers)
        for t, task in enumerate(tasks)
    ]
    finite = [row["value"] for row in rows if row["value"] is not None]
    middle = sum(finite) / max(1, len(finite))
    reach = max([abs(value - middle) for value in finite] + [1e-6])
    spec = heat_map(
        rows,
        names_across("task", tasks),
        names_down("layer", sorted(layers, key=sort_key), "(narrow ? 29 : 60)", labelFontSize=9),
        {
            "scale": {"scheme": "redblue", "reverse": True, "domain": [middle - reach, middle + reach]},
            "legend": {"orient": "top", "title": "coefficient", "format": ".3~f", "gradientLength": 180},
        },
        tips=[tip("layer", "nominal"), tip("task", "nominal"), tip("value", title="coefficient", format=".3f")],
        height=max(3.0, min(11.0, 760 / len(layers))) * len(layers),
    )
    least = 150 + 18 * len(tasks)
    about = f"White is the mean, {middle:.3f}. Names are without what all of them begin with."
    return Chart("Coefficients by layer and task", spec, about=about, width=max(260, 34 * len(tasks)), least=least)


def _by_task(learned: dict[str, Any], palette: Mapping[str, str]) -> Chart:
    rows = [{"task": task, "value": v} for task, v in zip(learned["tasks"], learned["coefficients"], strict=True)]
    y = {"field": "task", "type": "nominal", "sort": learned["tasks"], "title": None}
    tips = [tip("task", "nominal"), tip("value", format=".3f")]
    colour = coloured("task", {task: palette[task] for task in learned["tasks"]})
    encoding = {"x": number("value", "coefficient", zero=True), "y": y, "tooltip": tips, **colour}
    spec = specification(rows, mark="bar", encoding=encoding, height=22 * len(rows))
    return Chart("Coefficients", spec)


@figure("objective_over_steps", section="Coefficients", each="learning")
def objective(run: FinishedRun, name: str) -> Chart | None:
    """The objective at every step, and its running mean."""
    losses = run.points.get("objective", {}).get(name, {})
    steps = losses.get("steps", ())
    if len(steps) < 2:
        return None
    window = max(5, len(steps) // 20)
    each, mean = "each step", "running mean"
    rows = [{"step": s, "value": v, "curve": each} for s, v in zip(steps, losses["loss"], strict=True)]
    smooth = {"op": "mean", "field": "value", "as": "smooth"}
    legend = {each: PALETTE[8], mean: PALETTE[0]}
    x, title = number("step", "step", tickMinStep=1), "objective, summed over tasks"
    tips = [tip("step"), tip("value", format=".4g")]
    raw = {"mark": {"type": "line", "strokeWidth": 1}}
    raw["encoding"] = {"y": number("value", title), "tooltip": tips, **coloured("curve", legend)}
    running = {"window": [smooth], "frame": [1 - window, 0], "sort": [{"field": "step"}]}
    bold = {"transform": [running, {"calculate": f"'{mean}'", "as": "curve"}], "mark": {"type": "line"}}
    bold["encoding"] = {"y": number("smooth", title), **coloured("curve", legend)}
    return Chart("Objective over steps", specification(rows, layer=[raw, bold], encoding={"x": x}, height=200), legend)


@figure("accuracy_over_steps", section="Coefficients", each="learning")
def accuracy_over_steps(run: FinishedRun, name: str) -> Chart | None:
    """Mean accuracy over steps, where it was scored."""
    return accuracy_curve(run.data["learning"][name]["scores"])


def accuracy_curve(scores: dict[str, float | None]) -> Chart | None:
    """The curve of mean accuracies by step; None if there are none."""
    points = [{"step": int(step), "value": 100 * value} for step, value in scores.items() if value is not None]
    if not points:
        return None
    values = [point["value"] for point in points]
    middle, reach = (max(values) + min(values)) / 2, max(_LEAST_SPAN, max(values) - min(values)) / 2
    spec = line(points, "mean accuracy (%)")
    spec["encoding"]["y"]["scale"]["domain"] = [middle - reach, middle + reach]
    return Chart("Accuracy over steps", spec)
