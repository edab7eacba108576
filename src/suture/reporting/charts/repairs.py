"""Repairs: accuracy over steps, distance to the experts by layer, and the final features."""

from collections.abc import Mapping
from typing import Any

from suture.reporting.chart import INK, Chart, Choice, coloured, names_across, number, specification, tip
from suture.reporting.charts.coefficients import accuracy_curve
from suture.reporting.figures import figure
from suture.reporting.labels import layer_names
from suture.reporting.run_folder import FinishedRun

_SIDES = {"merged": "#d0524a", "repaired": "#3b82c4", "expert": INK}
_SHAPES = {"merged": "circle", "repaired": "triangle-up", "expert": "square"}
_MEAN = "mean over tasks"
_MEASURES = {"L1: mean |model − expert|": "l1", "linear CKA to the expert": "cka"}


@figure("accuracy_over_steps", section="Repair", each="repairs")
def accuracy_over_steps(run: FinishedRun, name: str) -> Chart | None:
    """Mean accuracy over steps, where it was scored."""
    return accuracy_curve(run.data["repairs"][name]["scores"])


@figure("l1_by_layer", section="Repair", each="repairs")
def by_layer(run: FinishedRun, name: str) -> Chart | None:
    """L1 and CKA to the expert after each block, before and after the repair: a task or the mean, over faint others."""
    distances = run.data["repairs"][name].get("representation")
    if distances is None:
        return None
    tasks = list(distances["before"]["l1"])
    layers = layer_names(list(distances["before"]["l1"][tasks[0]]))
    task, measure = Choice("task", "task", [_MEAN, *tasks]), Choice("measure", "show", list(_MEASURES), 200, ("y",))
    sides = {side: _SIDES[side] for side in ("merged", "repaired")}
    every = [{"filter": f"datum.task !== '{_MEAN}'"}]
    faint = coloured("side", sides, full=max(0.07, min(0.22, 1.8 / len(tasks))), faint=0.04)
    chosen = [task.filter]
    tips = [tip("side", "nominal"), tip("place", "nominal"), tip("value", format=".3f")]
    spec = specification(
        _distances(distances, layers),
        transform=[measure.filter],
        layer=[
            {"transform": every, "mark": {"type": "line", "strokeWidth": 1}, "encoding": {**faint, "detail": _TASK}},
            {"transform": chosen, "mark": "line", "encoding": {"strokeWidth": _larger(5, 1.6)}},
            {
                "transform": chosen,
                "mark": {"type": "point", "filled": True},
                "encoding": {"size": _larger(130, 45)},
            },
        ],
        height=240,
        encoding={
            "x": names_across("place", list(layers.values())),
            "y": number("value"),
            **coloured("side", sides),
            "tooltip": tips,
        },
    )
    return Chart("Distance to the experts by layer", spec, sides, [task, measure])


@figure("representation", section="Repair", each="repairs")
def scatter(run: FinishedRun, name: str) -> Chart | None:
    """The final features of merged, repaired and expert model on the principal axes of all three, by task."""
    points = run.points.get("scatter", {}).get(name, {})
    if not points:
        return None
    explained = run.points["explained"][name]
    task = Choice("task", "task", list(points), 150, ("x", "y"))
    rows = [
        {"x": x, "y": y, "model": model, "task": task}
        for task, sides in points.items()
        for model in reversed(_SIDES)
        for x, y in sides[model]
    ]
    names = [{"task": task, **_axis_names(explained[task])} for task in points]
    bare: dict[str, Any] = {"labels": False, "ticks": False, "grid": False}
    encoding = {"x": number("x", **bare), "y": number("y", **bare), "tooltip": [tip("model", "nominal")]}
    shapes = {"domain": list(_SHAPES), "range": list(_SHAPES.values())}
    shape = {"shape": {"field": "model", "type": "nominal", "scale": shapes, "legend": None}}
    marks = {
        "mark": {"type": "point", "filled": True, "size": {"expr": "height < 200 ? 13 : 34"}},
        "encoding": {**encoding, **shape, **coloured("model", _SIDES, faint=0.06, full=0.65)},
    }
    across = {"x": {"value": "width"}, "y": {"value": "height"}, "text": {"field": "across"}}
    up = {"x": {"value": 0}, "y": {"value": 0}, "text": {"field": "up"}}
    spec = specification(
        [*rows, *names],
        transform=[task.filter],
        layer=[
            {"transform": [{"filter": "isValid(datum.model)"}], **marks},
            {**_axis_text("right", 13), "encoding": across},
            {**_axis_text("left", -7), "encoding": up},
        ],
        height=340,
    )
    about = "On the first two principal axes of all three models' features; an axis names its share of their variance."
    return Chart("Final features", spec, _SIDES, [task], about)


def _axis_text(align: str, dy: int) -> dict[str, Any]:
    """A mark for the name of an axis, which differs from task to task."""
    mark = {"type": "text", "align": align, "dy": dy, "fontSize": 10, "color": INK, "opacity": 0.85}
    return {"transform": [{"filter": "isValid(datum.across)"}], "mark": mark}


def _axis_names(explained: Any) -> dict[str, str]:
    """The names of both axes; earlier versions stored the share of both together."""
    if not isinstance(explained, list):
        return {"across": f"axis 1 (axes 1 and 2: {explained:.0%} of the variance) →", "up": "↑ axis 2"}
    first, second = explained
    return {"across": f"axis 1: {first:.0%} of the variance →", "up": f"↑ axis 2: {second:.0%}"}


_TASK = {"field": "task", "type": "nominal"}


def _distances(distances: Mapping[str, Any], layers: Mapping[str, str]) -> list[dict[str, Any]]:
    """A row for each measure, side, task and layer, and for the means over tasks."""
    rows = []
    for measure, key in _MEASURES.items():
        for side, when in (("merged", "before"), ("repaired", "after")):
            table = distances[when][key]
            for path, layer in layers.items():
                values = {task: line[path] for task, line in table.items()}
                finite = [value for value in values.values() if value is not None]
                values[_MEAN] = sum(finite) / len(finite) if finite else None
                cell = {"measure": measure, "side": side, "place": layer}
                rows += [{**cell, "task": task, "value": value} for task, value in values.items()]
    return rows


def _larger(merged: float, repaired: float) -> dict[str, Any]:
    """A larger size for the merged model's marks, so that both are visible where they coincide."""
    return {"condition": {"test": "datum.side === 'merged'", "value": merged}, "value": repaired}
