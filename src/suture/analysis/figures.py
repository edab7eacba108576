"""The files of a finding: the table as JSON and CSV, the figure as PNG and SVG."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from suture.analysis.finding import Finding
from suture.reporting import rendering
from suture.reporting.chart import (
    INK,
    Chart,
    Choice,
    coloured,
    colours,
    heat_map,
    names_across,
    names_down,
    number,
    specification,
    tip,
)
from suture.reporting.labels import layer_names, short_names
from suture.storage.atomic import disk_errors

_CHARTS: dict[str, Callable[[Finding], Chart]] = {}


def save(finding: Finding, folder: str | Path) -> Path:
    """Write NAME.json, NAME.csv, NAME.png and NAME.svg into a folder, created if needed; returns the folder.

    Raises `OutputError` if they cannot be written.
    """
    folder = Path(folder)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{finding.name}.json").write_text(json.dumps(finding.as_data(), indent=2) + "\n", "utf-8")
        with (folder / f"{finding.name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([finding.heads, *finding.rows])
        rendering.save(chart_of(finding), folder / finding.name)
    return folder


def chart_of(finding: Finding) -> Chart:
    """The figure of a finding."""
    return _CHARTS[finding.name](finding)


def _draws(name: str) -> Callable[[Callable[[Finding], Chart]], Callable[[Finding], Chart]]:
    """Register a function that draws the figure of the analysis of this name."""

    def register(draw: Callable[[Finding], Chart]) -> Callable[[Finding], Chart]:
        _CHARTS[name] = draw
        return draw

    return register


@_draws("similarity")
def _similarity(finding: Finding) -> Chart:
    names = finding.labels["models"]
    cosine = finding.values["cosine"].tolist()
    rows = [
        {"model": one, "other": other, "value": _finite(cosine[i][j])}
        for i, one in enumerate(names)
        for j, other in enumerate(names)
    ]
    scale = {"scheme": "redblue", "reverse": True, "domain": [-1, 1]}
    spec = heat_map(
        rows,
        names_across("other", names),
        names_down("model", names),
        {"scale": scale, "legend": {"title": "cosine", "gradientLength": 120}},
        tips=[tip("model", "nominal"), tip("other", "nominal"), tip("value", format=".3f")],
        height=max(80, 34 * len(names)),
        numbers=".2f",
    )
    return Chart("Cosine similarity of task vectors", spec, width=max(160, 40 * len(names)))


@_draws("layers")
def _layers(finding: Finding) -> Chart:
    columns = {"norm / base": "relative", "sign conflict": "conflict", "agreement": "agreement"}
    return _by_tensor("Task vectors, tensor by tensor", finding, columns)


@_draws("trimming")
def _trimming(finding: Finding) -> Chart:
    columns = {"kept": "kept", "collide": "collide", "lost": "lost"}
    return _by_tensor(finding.title[:1].upper() + finding.title[1:], finding, columns)


def _by_tensor(title: str, finding: Finding, columns: dict[str, str]) -> Chart:
    """Bars of several measures side by side, one row per tensor."""
    names = short_names(finding.labels["tensors"])
    rows = []
    for measure, key in columns.items():
        values = finding.values[key]
        means = (values if values.ndim == 1 else values.mean(1)).tolist()
        rows += [{"tensor": n, "measure": measure, "value": _finite(v)} for n, v in zip(names, means, strict=True)]
    height = max(60, round(max(3.0, min(12.0, 1100 / len(names))) * len(names)))
    choice = Choice("measure", "show", list(columns), height, ("x",))
    legend = colours(columns)
    spec = specification(
        rows,
        transform=[choice.filter],
        mark="bar",
        height=height,
        encoding={
            "x": number("value", zero=True, tickCount=4),
            "y": names_down("tensor", names, "44", labelFontSize=8),
            **coloured("measure", legend),
        },
    )
    return Chart(title, spec, choices=[choice], width=900)


@_draws("interpolation")
def _interpolation(finding: Finding) -> Chart:
    points, together = finding.labels["points"], "all, mean over tasks"
    curves = dict(zip(finding.labels["models"], finding.values["alone"].tolist(), strict=True))
    curves[together] = finding.values["together"].mean(0).tolist()
    rows = [
        {"λ": point, "model": name, "value": 100 * value}
        for name, curve in curves.items()
        for point, value in zip(points, curve, strict=True)
    ]
    legend = colours(curves, {together: INK})
    heavy = {"condition": {"test": f"datum.model === '{together}'", "value": 3}, "value": 1.5}
    encoding = {"x": number("λ", "λ"), "y": number("value", "accuracy (%)"), "strokeWidth": heavy}
    mark = {"type": "line", "point": {"size": 30, "filled": True}}
    spec = specification(rows, mark=mark, encoding={**encoding, **coloured("model", legend)}, height=300)
    return Chart("Accuracy from the base (λ = 0) to each model (λ = 1)", spec, legend)


@_draws("landscape")
def _landscape(finding: Finding) -> Chart:
    """A cell for each scored point, with labels at the base and the two models."""
    (first, other), points = finding.labels["models"], finding.labels["points"]
    mean = finding.values["accuracy"].mean(0).tolist()
    rows = [{"a": a, "b": b, "value": 100 * mean[i][j]} for i, a in enumerate(points) for j, b in enumerate(points)]
    ends = {(0.0, 0.0): "pretrained", (1.0, 0.0): first, (0.0, 1.0): other}
    named = [{**row, "name": ends[row["a"], row["b"]]} for row in rows if (row["a"], row["b"]) in ends]
    axis = {"type": "ordinal", "axis": {"labelAngle": 0, "grid": False}}
    x = {"field": "a", "title": f"λ {first}", **axis}
    y = {"field": "b", "title": f"λ {other}", "sort": "descending", **axis}
    legend = {"title": "mean accuracy (%)", "gradientLength": 160}
    tips = [tip("a"), tip("b"), tip("value", format=".1f")]
    side = max(220, 62 * len(points))
    colour = {"scale": {"scheme": "viridis"}, "legend": legend}
    spec = heat_map(rows, x, y, colour, tips=tips, height=side, numbers=".1f")
    below = {"type": "text", "dy": 18, "fontSize": 9, "fontStyle": "italic"}
    encoding = {"text": {"field": "name"}, "color": spec["layer"][1]["encoding"]["color"]}
    names = {"data": {"values": named}, "mark": below, "encoding": encoding}
    return Chart(f"Accuracy between {first} and {other}", {**spec, "layer": [*spec["layer"], names]}, width=side)


@_draws("bias")
def _bias(finding: Finding) -> Chart:
    tasks, layers = finding.labels["tasks"], layer_names(finding.labels["places"])
    measures, mean = {"mean |merged − expert|": "l1", "linear CKA": "cka"}, "mean over tasks"
    rows = []
    for measure, key in measures.items():
        curves = dict(zip(tasks, finding.values[key].tolist(), strict=True))
        curves[mean] = finding.values[key].mean(0).tolist()
        for task, curve in curves.items():
            cells = zip(layers.values(), curve, strict=True)
            rows += [{"measure": measure, "task": task, "layer": layer, "value": v} for layer, v in cells]
    measure = Choice("measure", "show", list(measures), 220, ("y",))
    legend = colours([*tasks, mean], {mean: INK})
    heavy = {"condition": {"test": f"datum.task === '{mean}'", "value": 3}, "value": 1.3}
    encoding: dict[str, Any] = {"x": names_across("layer", list(layers.values())), "y": number("value")}
    spec = specification(
        rows,
        transform=[measure.filter],
        mark={"type": "line", "point": {"size": 24, "filled": True}},
        height=240,
        encoding={**encoding, "strokeWidth": heavy, **coloured("task", legend)},
    )
    return Chart("Distance of the merged model to its experts", spec, legend, [measure], width=760)


def _finite(value: float) -> float | None:
    """The value, or None for a bar to leave out: a tensor that is zero in the base has no relative norm."""
    return value if math.isfinite(value) else None
