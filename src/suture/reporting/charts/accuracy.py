"""Accuracy by task, over a swept knob, and of every expert on every task."""

from collections.abc import Mapping, Sequence
from typing import Any

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
from suture.reporting.figures import figure
from suture.reporting.run_folder import FinishedRun, is_reference
from suture.reporting.scores import interval

_REFERENCES = {"pretrained": "#8a94a0", "experts": INK}  # by role
_MANY = 8  # with more models than this, bars would be too thin, so a heat map is drawn
_MOST_BARS = 90  # with more bars than this, the figure would be longer than a screen
_MEASURES = ("accuracy (%)", "relative to the expert (%)", "gap closed (%)")
_SCORE = "score (%)"  # the first of these, where it is no accuracy


@figure("accuracy", section="Task by task")
def accuracy(run: FinishedRun) -> Chart | None:
    """Every model on every task: bars, or a heat map if there are many models."""
    data = run.data
    if not data["rows"] or not data["tasks"]:
        return None
    names, tasks = [row["name"] for row in data["rows"]], [*data["tasks"], "mean"]
    in_percent = all(each["share"] for each in data.get("metrics", {}).values())
    measures = _MEASURES if in_percent else _MEASURES[:0:-1]  # the gap closed first, which has a sign in any unit
    rows = [row for task in tasks for row in _on_task(data, task) if row["measure"] in measures]
    if not rows:
        return None
    if data.get("metrics"):
        rows = [row | {"measure": _SCORE} if row["measure"] == _MEASURES[0] else row for row in rows]
        measures = [_SCORE if name == _MEASURES[0] else name for name in measures]
    measure = Choice("measure", "show", measures)
    title = "Scores by task" if data.get("metrics") else "Accuracy by task"
    missing = _without_gap(rows, data["tasks"])
    if len(names) > _MANY or len(names) * len(tasks) > _MOST_BARS:
        cells = {**_cells(rows, names, tasks), "transform": [measure.filter]}
        width, least = max(400, 34 * len(tasks)), 190 + 25 * len(tasks)
        return Chart(title, cells, choices=[measure], about=_about(rows, missing), width=width, least=least)
    palette = model_colours(data)
    legend = {name: palette[name] for name in names}
    bars = {**_bars(rows, legend, tasks), "transform": [measure.filter]}
    return Chart(title, bars, legend, [measure], _about(rows, missing, lines=True))


def _about(rows: Sequence[Mapping[str, Any]], missing: Sequence[str], *, lines: bool = False) -> str:
    """A sentence on the lines of bars, and one on the tasks without a gap."""
    parts = ["Lines are 95% intervals (Wilson)."] if lines and any("low" in row for row in rows) else []
    if missing:
        parts.append(f"No gap to close on {', '.join(missing)}: the pretrained model is as good as the expert.")
    return " ".join(parts)


def _without_gap(rows: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> list[str]:
    """The tasks whose gap closed is not defined, though that of others is."""
    known = {row["task"] for row in rows if row["measure"] == _MEASURES[2]}
    return [task for task in tasks if known and task not in known]


_TIPS = [tip("model", "nominal"), tip("task", "nominal"), tip("value", format=".1f")]
_TIPS += [tip("low", title="95% from", format=".1f"), tip("high", title="to", format=".1f")]


def _cells(rows: Sequence[Mapping[str, Any]], names: Sequence[str], tasks: Sequence[str]) -> dict[str, Any]:
    return heat_map(
        rows,
        names_across("task", tasks),
        names_down("model", names),
        {"scale": {"scheme": "blues"}},
        tips=_TIPS,
        height=22 * len(names),
        numbers=".0f",
    )


def _bars(rows: Sequence[Mapping[str, Any]], legend: Mapping[str, str], tasks: Sequence[str]) -> dict[str, Any]:
    bar = {"mark": {"type": "bar", "cornerRadiusEnd": 2}, "encoding": coloured("model", legend)}
    span = {"x": number("low", zero=True), "x2": {"field": "high"}, "color": {"value": INK}}
    line = {"transform": [{"filter": "isValid(datum.low)"}], "mark": {"type": "rule", "opacity": 0.7}, "encoding": span}
    return specification(
        rows,
        layer=[bar, *([line] if any("low" in row for row in rows) else [])],
        height=len(tasks) * (10 if len(legend) > 4 else 14) * len(legend),
        encoding={
            "y": {"field": "task", "type": "nominal", "sort": tasks, "title": None, "scale": {"paddingInner": 0.25}},
            "yOffset": {"field": "model", "sort": list(legend)},
            "x": number("value", zero=True),
            "tooltip": _TIPS,
        },
    )


@figure("accuracy_over", section="Sweeps", each="curves")
def curves(run: FinishedRun, knob: str) -> Chart | None:
    """Mean accuracy against a knob, with the pretrained model and the experts as dashed lines."""
    data, swept = run.data, run.data["curves"][knob]
    points = [{"x": x, "y": 100 * y, "model": name} for name, curve in swept.items() for x, y in curve]
    if not points:
        return None
    references = [{"y": 100 * r["mean"], "model": r["name"]} for r in data["rows"] if is_reference(r) and r["mean"]]
    palette = model_colours(data)
    legend = {name: palette[name] for name in [*swept, *(row["model"] for row in references)]}
    title = "scaling factor λ" if knob == "scaling_factor" else knob.replace("_", " ")
    tips = [tip("model", "nominal"), tip("x", title=title), tip("y", title="mean accuracy", format=".1f")]
    y = number("y", "mean accuracy (%)")
    x = number("x", title, kind="log" if _spans_decades([point["x"] for point in points]) else "linear")
    curve = {"mark": {"type": "line", "point": {"size": 60, "filled": True}}}
    curve["encoding"] = {"x": x, "y": y, **coloured("model", legend), "tooltip": tips}
    rule = {"data": {"values": references}, "mark": {"type": "rule", "strokeDash": [5, 4]}}
    rule["encoding"] = {"y": y, **coloured("model", legend), "tooltip": tips[::2]}
    spec = specification(points, layer=[curve, *([rule] if references else [])], height=260)
    return Chart(f"Accuracy against {title}", spec, legend)


@figure("expert_matrix", section="Every model on every task")
def matrix(run: FinishedRun) -> Chart | None:
    """Every fine-tuned model on every task."""
    models, tasks = run.data.get("matrix", {}), run.data["tasks"]
    if not models:
        return None
    cells = [(model, task, value) for model, row in models.items() for task, value in row.items()]
    shares = all(each["share"] for each in data_metrics(run).values())
    unit = 100 if shares else 1
    rows = [{"model": m, "task": t, "value": unit * value} for m, t, value in cells if value is not None]
    spec = heat_map(
        rows,
        {**names_across("task", tasks), "title": "task"},
        {**names_down("model", list(models)), "title": "model"},
        {"scale": {"scheme": "blues", **({"domain": [0, 100]} if shares else {"reverse": True})}},
        tips=[
            tip("model", "nominal"),
            tip("task", "nominal"),
            tip("value", title="accuracy" if shares else "score", format=".1f" if shares else ".3f"),
        ],
        height=26 * len(models),
        numbers=".0f" if shares else ".2f",
    )
    title = "Every model on every task" + (", accuracy in %" if shares else "")
    width, least = max(240, 34 * len(tasks)), 190 + 25 * len(tasks)
    return Chart(title, spec, width=width, least=least)


def data_metrics(run: FinishedRun) -> Mapping[str, Any]:
    """Task → its metric, of the tasks whose score is no accuracy."""
    return run.data.get("metrics", {})


def model_colours(data: Mapping[str, Any]) -> dict[str, str]:
    """The colour of each model of a run, in all its figures."""
    fixed = {row["name"]: _REFERENCES[row["role"]] for row in data["rows"] if is_reference(row)}
    swept = [name for curves in data.get("curves", {}).values() for name in curves]
    return colours([*swept, *(row["name"] for row in data["rows"])], fixed)


def _on_task(data: Mapping[str, Any], task: str) -> list[dict[str, Any]]:
    """Each model's accuracy on a task, or their mean, by every measure, in percent, without undefined values.

    `low` and `high` are the 95% interval; references count as exact. A normalised mean has none.
    """
    by_role = {row["role"]: _value(row, task) for row in data["rows"]}
    low, high = by_role.get("pretrained"), by_role.get("experts")
    starts: tuple[tuple[float | None, float | None], ...] = ((0, 1), (0, high), (low, high))
    cells = []
    for row in data["rows"]:
        value, bounds = _value(row, task), interval(data, row, task)
        for measure, (start, goal) in zip(_MEASURES, starts, strict=True):
            of_mean = task == "mean" and measure == _MEASURES[1]
            share = row["normalised_mean"] if of_mean else _share(value, start, goal)
            if data.get("metrics") and measure != _MEASURES[0]:
                share, bounds = _relative(data, row, task, measure, high) or share, None
            if share is None:
                continue
            cell = {"model": row["name"], "task": task, "measure": measure, "value": 100 * share}
            ends = {} if bounds is None or of_mean else dict(zip(("low", "high"), bounds, strict=True))
            shares = {key: _share(bound, start, goal) for key, bound in ends.items()}
            cells.append(cell | {key: 100 * end for key, end in shares.items() if end is not None})
    return cells


def _value(row: Mapping[str, Any], task: str) -> float | None:
    return row["mean"] if task == "mean" else row["accuracies"].get(task)


def _relative(
    data: Mapping[str, Any], row: Mapping[str, Any], task: str, measure: str, high: float | None
) -> float | None:
    """A relative score of a run with scores in several units; None where the usual formula holds."""
    if task == "mean":
        return row["normalised_mean"] if measure == _MEASURES[1] else row["gap_closed"]
    lower = data["metrics"].get(task, {}).get("lower", False)
    return _share(high, 0, _value(row, task)) if lower and measure == _MEASURES[1] else None


def _share(value: float | None, start: float | None, goal: float | None) -> float | None:
    """(value − start) / (goal − start); None if it is undefined."""
    return None if value is None or start is None or goal is None or start == goal else (value - start) / (goal - start)


def _spans_decades(values: list[float]) -> bool:
    return min(values) > 0 and max(values) >= 20 * min(values)
