"""The charts of the page as Vega-Lite: plain dicts made of what a finished run left.

A name that comes from a user is only ever a value of the data, never part of an expression.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from suture.core.names import natural
from suture.reporting.learning_figures import short_names

INK = "currentColor"  # of the page, so that charts follow its theme
REFERENCES = {"pretrained": "#8a94a0", "experts": INK}
PALETTE = (
    *("#3b82c4", "#e08a2e", "#3aa76d", "#b463b4", "#d0524a", "#6b78d6", "#a07c4f", "#35a3b0"),
    *("#8db8dd", "#eec08d", "#8fd0ab", "#d9b0d9", "#e6a39f", "#b3bbec", "#cbb494", "#8fd0d8"),
)
_MANY = 8  # rows from which on bars are too thin and a heat map shows them
_SIDES = {"merged": "#d0524a", "repaired": "#3b82c4", "expert": INK}


@dataclass(frozen=True)
class Chart:
    """A Vega-Lite spec, and what the page puts above it.

    `legend`: name → colour; a click sets the parameter `picked`. `choices`: (parameter, label, options) of selectors.
    """

    title: str
    spec: Mapping[str, Any]
    legend: Mapping[str, str] = field(default_factory=dict)
    choices: Sequence[tuple[str, str, Sequence[str]]] = ()
    about: str = ""


def colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name, those of the references always the same."""
    others = [name for name in dict.fromkeys(names) if name not in REFERENCES]
    drawn = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(others)}
    return {name: REFERENCES.get(name) or drawn[name] for name in dict.fromkeys(names)}


def accuracy(data: Mapping[str, Any]) -> Chart:
    """Every model on every task: bars, or a heat map where there are many models."""
    measures = ["accuracy (%)", "relative to the expert (%)", "gap closed (%)"]
    rows = [row for task in [*data["tasks"], "mean"] for row in _on_task(data, task)]
    names = [row["name"] for row in data["rows"]]
    tasks = [*data["tasks"], "mean"]
    shown = {"calculate": f"measure === '{measures[0]}' ? datum.a : measure === '{measures[1]}' ? datum.r : datum.g"}
    values = [{**shown, "as": "value"}, {"filter": "isValid(datum.value)"}]
    params = [{"name": "measure", "value": measures[0]}]
    hint = [_tip("model", "nominal"), _tip("task", "nominal"), _tip("value", format=".1f")]
    choices = [("measure", "show", measures)]
    if len(names) > _MANY:
        spec = _heat(rows, "task", "model", "value", hint, sorts=(tasks, names), step=22, labels=".0f")
        return Chart("Accuracy by task", {**spec, "transform": values, "params": params}, choices=choices)
    palette = colours(names)
    spec = _spec(
        rows,
        transform=values,
        params=[*params, _PICKED],
        mark={"type": "bar", "cornerRadiusEnd": 2},
        height=len(tasks) * (10 if len(names) > 4 else 14) * len(names),
        encoding={
            "y": {"field": "task", "type": "nominal", "sort": tasks, "title": None, "scale": {"paddingInner": 0.25}},
            "yOffset": {"field": "model", "sort": names},
            "x": {"field": "value", "type": "quantitative", "title": None},
            **_coloured("model", palette),
            "tooltip": hint,
        },
    )
    return Chart("Accuracy by task", spec, palette, choices)


def curves(data: Mapping[str, Any], knob: str) -> Chart:
    """Mean accuracy against a knob, with pretrained model and experts as lines to compare with."""
    title = "scaling factor λ" if knob == "scaling_factor" else knob.replace("_", " ")
    found = data["curves"][knob]
    points = [{"x": x, "y": 100 * y, "model": name} for name, curve in found.items() for x, y in curve]
    known = [{"y": 100 * r["mean"], "model": r["name"]} for r in data["rows"] if r["name"] in REFERENCES and r["mean"]]
    places = sorted({point["x"] for point in points})
    wide = places[0] > 0 and places[-1] >= 20 * places[0]
    x = {
        "field": "x",
        "type": "quantitative",
        "title": title,
        "scale": {"type": "log" if wide else "linear", "zero": False},
    }
    y = {"field": "y", "type": "quantitative", "title": "mean accuracy (%)", "scale": {"zero": False}}
    hint = [_tip("model", "nominal"), _tip("x", title=title), _tip("y", title="mean accuracy", format=".1f")]
    palette = colours([*found, *(row["model"] for row in known)])
    line = {"mark": {"type": "line", "point": {"size": 60, "filled": True}}}
    line["encoding"] = {"x": x, "y": y, **_coloured("model", palette), "tooltip": hint}
    rule = {"data": {"values": known}, "mark": {"type": "rule", "strokeDash": [5, 4]}}
    rule["encoding"] = {
        "y": {"field": "y", "type": "quantitative"},
        **_coloured("model", palette),
        "tooltip": hint[::2],
    }
    spec = _spec(points, params=[_PICKED], layer=[line, *([rule] if known else [])], height=260)
    return Chart(f"Accuracy against {title}", spec, palette)


def learning(learned: Mapping[str, Any], over_steps: Mapping[str, Any], losses: Mapping[str, Any]) -> list[Chart]:
    """How coefficients were learned: over steps, by layer and task, the objective, accuracy on the way."""
    charts = [_over_steps(over_steps, bool(learned["layers"]))] if len(over_steps.get("steps", ())) > 1 else []
    charts.append(_by_layer(learned) if learned["layers"] else _by_task(learned))
    if len(losses.get("steps", ())) > 1:
        points = [{"step": s, "value": v} for s, v in zip(losses["steps"], losses["loss"], strict=True)]
        charts.append(Chart("Objective over steps", _line(points, "objective, summed over tasks")))
    return [*charts, *accuracy_over_steps(learned["scores"])]


def accuracy_over_steps(scores: Mapping[str, float]) -> list[Chart]:
    """Mean accuracy where it was scored on the way; nothing where it was not."""
    points = [{"step": int(step), "value": 100 * value} for step, value in scores.items()]
    return [Chart("Accuracy over steps", _line(points, "mean accuracy (%)"))] if points else []


def by_place(distances: Mapping[str, Any]) -> Chart:
    """L1 and CKA to the expert after each block, before and after the repair."""
    tasks = list(distances["before"]["l1"])
    places = list(distances["before"]["l1"][tasks[0]])
    rows = [
        {
            "place": _last(place),
            "side": side,
            "task": task,
            **{m: distances[key][m][task][place] for m in ("l1", "cka")},
        }
        for key, side in (("before", "merged"), ("after", "repaired"))
        for task in tasks
        for place in places
    ]
    everything, measures = "mean over tasks", ["L1: mean |model − expert|", "linear CKA to the expert"]
    mean = {"op": "mean", "field": "value", "as": "value"}
    transform = [
        {"calculate": f"measure === '{measures[0]}' ? datum.l1 : datum.cka", "as": "value"},
        {"filter": f"task === '{everything}' || datum.task === task"},
        {"aggregate": [mean], "groupby": ["place", "side"]},
    ]
    sides = {side: _SIDES[side] for side in ("merged", "repaired")}
    spec = _spec(
        rows,
        transform=transform,
        params=[{"name": "task", "value": everything}, {"name": "measure", "value": measures[0]}, _PICKED],
        layer=[
            {"mark": "line", "encoding": {"strokeWidth": _larger("side", sides, [5, 1.6])}},
            {"mark": {"type": "point", "filled": True}, "encoding": {"size": _larger("side", sides, [130, 45])}},
        ],
        height=240,
        encoding={
            "x": {**_across("place"), "sort": [_last(p) for p in places]},
            "y": {"field": "value", "type": "quantitative", "title": None},
            **_coloured("side", sides),
            "tooltip": [_tip("side", "nominal"), _tip("place", "nominal"), _tip("value", format=".3f")],
        },
    )
    return Chart(
        "Distance to the experts by layer",
        spec,
        sides,
        [("task", "task", [everything, *tasks]), ("measure", "show", measures)],
    )


def scatter(points: Mapping[str, Any], explained: Mapping[str, float]) -> Chart:
    """The final features of merged, repaired and expert model on the two main axes of all three, one task at a time."""
    rows = [
        {"x": x, "y": y, "model": model, "task": task}
        for task, sides in points.items()
        for model in _SIDES
        for x, y in sides[model]
    ]
    place = lambda axis: {
        "field": axis,
        "type": "quantitative",
        "title": None,
        "scale": {"zero": False},
        "axis": {"labels": False, "ticks": False, "grid": False},
    }
    spec = _spec(
        rows,
        transform=[{"filter": "datum.task === task"}],
        params=[{"name": "task", "value": next(iter(points))}, _PICKED],
        mark={"type": "point", "filled": True, "size": 34},
        height=340,
        encoding={
            **{"x": place("x"), "y": place("y")},
            **_coloured("model", _SIDES, faint=0.06, full=0.65),
            "tooltip": [_tip("model", "nominal")],
        },
    )
    shares = ", ".join(f"{task} {share:.0%}" for task, share in explained.items())
    about = f"On the two main axes of all three models together; the share of the variance that they hold: {shares}."
    return Chart("Final features", spec, _SIDES, [("task", "task", list(points))], about)


def matrix(data: Mapping[str, Any]) -> Chart:
    """Every fine-tuned model on every task."""
    models, tasks = list(data["matrix"]), data["tasks"]
    rows = [{"model": m, "task": t, "value": 100 * v} for m, row in data["matrix"].items() for t, v in row.items()]
    hint = [_tip("model", "nominal"), _tip("task", "nominal"), _tip("value", title="accuracy", format=".1f")]
    spec = _heat(rows, "task", "model", "value", hint, sorts=(tasks, models), step=26, labels=".0f")
    return Chart("Every model on every task, accuracy in %", spec)


_PICKED = {"name": "picked", "value": None}
_CONFIG = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        **{f"{part}Color": INK for part in ("label", "title", "domain", "tick", "grid")},
        **{
            "gridOpacity": 0.13,
            "domainOpacity": 0.4,
            "tickOpacity": 0.4,
            "labelOpacity": 0.85,
            "titleFontWeight": "normal",
        },
        **{"labelFontSize": 11, "titleFontSize": 11, "labelLimit": 110},
    },
    "axisQuantitative": {"labelOverlap": "greedy", "labelSeparation": 8},
    "legend": {"labelColor": INK, "titleColor": INK},
}


def _spec(rows: Sequence[Mapping[str, Any]], **parts: Any) -> dict[str, Any]:
    whole = {"width": "container", "config": _CONFIG}
    return {"$schema": "https://vega.github.io/schema/vega-lite/v6.json", **whole, "data": {"values": rows}, **parts}


def _end_of_label(narrow: int, wide: int) -> str:
    """Names differ at their ends: on a narrow page fewer letters of them are left."""
    room = f"(width < 420 ? {narrow} : {wide})"
    return f"length(datum.label) > {room} ? '…' + slice(datum.label, 1 - {room}) : datum.label"


def _across(name: str) -> dict[str, Any]:
    return {"field": name, "type": "nominal", "title": None, "axis": {"labelAngle": -40, "grid": False}}


def _larger(name: str, names: Iterable[str], sizes: Sequence[float]) -> dict[str, Any]:
    """The first name's marks larger than the other's, so that they are seen where both are the same."""
    return {"field": name, "type": "ordinal", "scale": {"domain": list(names), "range": sizes}, "legend": None}


def _line(points: Sequence[Mapping[str, Any]], title: str) -> dict[str, Any]:
    y = {"field": "value", "type": "quantitative", "title": title, "scale": {"zero": False}}
    x = {"field": "step", "type": "quantitative", "title": "step", "axis": {"tickMinStep": 1}}
    encoding = {"x": x, "y": y, "tooltip": [_tip("step"), _tip("value", format=".4g")]}
    mark = {"type": "line", "color": PALETTE[0], "point": {"size": 20, "filled": True, "color": PALETTE[0]}}
    return _spec(points, mark=mark, encoding=encoding, height=200)


def _heat(
    rows, across: str, down: str, value: str, hint, *, sorts, step: float, labels: str = "", scheme="blues"
) -> dict:
    """Coloured cells, with the numbers in them where there is a format for them."""
    x = {
        "field": across,
        "type": "nominal",
        "sort": sorts[0],
        "title": None,
        "axis": {"labelAngle": -40, "grid": False},
    }
    y = {
        "field": down,
        "type": "nominal",
        "sort": sorts[1],
        "title": None,
        "axis": {"labelOverlap": True, "grid": False, "labelLimit": 280, "labelExpr": _end_of_label(24, 48)},
    }
    colour = {"field": value, "type": "quantitative", "scale": {"scheme": scheme}, "legend": None}
    cell = {"mark": "rect", "encoding": {"color": colour, "tooltip": hint}}
    middle = {
        "condition": {"test": f"luminance(scale('color', datum.{value})) < 0.35", "value": "white"},
        "value": "black",
    }
    text = {"field": value, "type": "quantitative", "format": labels}
    written = {"mark": {"type": "text", "fontSize": 10}, "encoding": {"text": text, "color": middle, "tooltip": hint}}
    layers = [cell, written] if labels else [cell]
    return _spec(rows, layer=layers, encoding={"x": x, "y": y}, height=step * len(sorts[1]))


def _over_steps(over_steps: Mapping[str, Any], layers: bool) -> Chart:
    tasks = list(over_steps["mean"])
    rows = [
        {"step": step, "task": task, **{side: over_steps[side][task][i] for side in ("mean", "low", "high")}}
        for task in tasks
        for i, step in enumerate(over_steps["steps"])
    ]
    palette = colours(tasks)
    title = "coefficient" + (", mean and range over layers" if layers else "")
    x = {"field": "step", "type": "quantitative", "axis": {"tickMinStep": 1}}
    y = {"field": "mean", "type": "quantitative", "title": title, "scale": {"zero": False}}
    hint = [_tip("task", "nominal"), _tip("step"), *(_tip(side, format=".3f") for side in ("mean", "low", "high"))]
    band = {"mark": "area", "encoding": {"y": {**y, "field": "low"}, "y2": {"field": "high"}}}
    band["encoding"] |= _coloured("task", palette, faint=0, full=0.3, else_=0.05)
    line = {"mark": {"type": "line", "point": {"size": 14, "filled": True}}}
    line["encoding"] = {"y": y, "tooltip": hint, **_coloured("task", palette)}
    spec = _spec(rows, params=[_PICKED], layer=[*([band] if layers else []), line], encoding={"x": x}, height=260)
    return Chart("Coefficients over steps", spec, palette)


def _by_layer(learned: Mapping[str, Any]) -> Chart:
    layers, tasks = short_names(learned["layers"]), learned["tasks"]
    rows = [
        {"layer": layer, "task": task, "value": learned["coefficients"][t][i]}
        for i, layer in enumerate(layers)
        for t, task in enumerate(tasks)
    ]
    middle = sum(row["value"] for row in rows) / max(1, len(rows))
    hint = [_tip("layer", "nominal"), _tip("task", "nominal"), _tip("value", title="coefficient", format=".3f")]
    step = max(3.0, min(11.0, 760 / len(layers)))
    spec = _heat(rows, "task", "layer", "value", hint, sorts=(tasks, sorted(layers, key=natural)), step=step)
    spec["encoding"]["y"]["axis"] |= {"labelFontSize": 8, "labelExpr": _end_of_label(29, 60)}
    spec["layer"][0]["encoding"]["color"] |= {
        "scale": {"scheme": "redblue", "reverse": True, "domainMid": middle},
        "legend": {"orient": "top", "title": "coefficient", "format": ".3~f"},
    }
    about = f"White is the mean, {middle:.3f}. Names are without what all of them begin with."
    return Chart("Coefficients by layer and task", spec, about=about)


def _by_task(learned: Mapping[str, Any]) -> Chart:
    rows = [{"task": task, "value": v} for task, v in zip(learned["tasks"], learned["coefficients"], strict=True)]
    y = {"field": "task", "type": "nominal", "sort": learned["tasks"], "title": None}
    x = {"field": "value", "type": "quantitative", "title": "coefficient"}
    encoding = {"x": x, "y": y, "tooltip": [_tip("task", "nominal"), _tip("value", format=".3f")]}
    return Chart(
        "Coefficients", _spec(rows, mark={"type": "bar", "color": PALETTE[0]}, encoding=encoding, height=22 * len(rows))
    )


def _coloured(
    key: str, palette: Mapping[str, str], *, faint=0.12, full=1.0, else_: float | None = None
) -> dict[str, Any]:
    """Colour by name, and the names that are not picked in the legend faint."""
    scale = {"domain": list(palette), "range": list(palette.values())}
    usual = full if else_ is None else else_
    picked = [{"test": "picked === null", "value": usual}, {"test": f"datum.{key} === picked", "value": full}]
    colour = {"field": key, "type": "nominal", "scale": scale, "legend": None}
    return {"color": colour, "opacity": {"condition": picked, "value": faint}}


def _on_task(data: Mapping[str, Any], task: str) -> list[dict[str, Any]]:
    """Each model's accuracy on a task, or their mean, in percent; relative to the expert's; the gap closed."""
    if task == "mean":
        measured = [(row["name"], row["mean"], row["normalised_mean"], row["gap_closed"]) for row in data["rows"]]
    else:
        known = {row["name"]: row["accuracies"].get(task) for row in data["rows"]}
        low, high = known.get("pretrained"), known.get("experts")
        measured = [(name, a, _share(a, 0, high), _share(a, low, high)) for name, a in known.items()]
    scaled = [(name, *(None if v is None else 100 * v for v in values)) for name, *values in measured]
    return [{"model": n, "task": task, "a": a, "r": r, "g": g} for n, a, r, g in scaled if a is not None]


def _share(value: float | None, start: float | None, goal: float | None) -> float | None:
    """(value − start) / (goal − start); None where it is not defined."""
    return None if value is None or start is None or goal is None or start == goal else (value - start) / (goal - start)


def _tip(name: str, kind: str = "quantitative", **more: str) -> dict[str, Any]:
    return {"field": name, "type": kind, **more}


def _last(place: str) -> str:
    return "final" if place == "(features)" else ".".join(place.split(".")[-2:])
