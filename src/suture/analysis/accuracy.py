"""Accuracy along lines and over planes of weights: base + Σ λ_t τ_t for many λ, with a new merge at each point."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from suture.analysis.finding import Finding, draws
from suture.analysis.registry import analysis_kind
from suture.analysis.weights import Models
from suture.checkpoints import Source
from suture.core.progress import Track, untracked
from suture.errors import ConfigError
from suture.evaluation import BATCH_SIZE, Row, TaskInputs, evaluate_row
from suture.families.shared.base import Encoder
from suture.merging.task_vectors import TaskVectors, open_task_vectors
from suture.reporting.chart import INK, Chart, coloured, colours, heat_map, number, specification, tip

POINTS = (0.0, 0.25, 0.5, 0.75, 1.0)


@analysis_kind(reads="tasks", keys={"points": "coefficients, with commas between them"})
def interpolation(
    module: nn.Module,
    base: Source,
    models: Models,
    tasks: Mapping[str, TaskInputs],
    *,
    points: Sequence[float] = POINTS,
    frozen: Sequence[str] = (),
    batch_size: int | Literal["auto"] = BATCH_SIZE,
    track: Track = untracked,
) -> Finding:
    """Accuracy from the base (λ = 0) to each model (λ = 1) on its own task, and of their sum on all tasks.

    `module` is the architecture; it is copied. `tasks` has a task for each model's name. `values`: "alone" (model,
    point), the accuracy of base + λ τ, and "together" (task, point), that of base + λ Σ τ.
    """
    vectors = _task_vectors(base, models, tasks, frozen)
    module, names = copy.deepcopy(module), list(vectors.models)

    def score(state: Mapping[str, Tensor], on: Mapping[str, TaskInputs]) -> Row:
        return evaluate_row("", _loaded(module, state), on, batch_size=batch_size, track=track)

    alone = [[score(state, {n: tasks[n]}).on(n) for state in _line(vectors, [n], points)] for n in names]
    together = [score(state, tasks) for state in _line(vectors, names, points)]
    on_each = torch.tensor([[row.on(task) for row in together] for task in tasks], dtype=torch.float64)
    values = {"alone": torch.tensor(alone, dtype=torch.float64), "together": on_each}
    mean = on_each.mean(0).tolist()
    rows = [(p, mean[i], *(line[i] for line in alone)) for i, p in enumerate(points)]
    heads = ("λ", "all, mean over tasks", *names)
    labels = {"models": names, "tasks": list(tasks), "points": list(points)}
    notes = ("A model's column is base + λ τ of this model alone, on its own task.",)
    return Finding("interpolation", "accuracy from the base to each model", heads, rows, values, labels, notes)


@analysis_kind(reads="tasks", keys={"points": "coefficients, with commas between them"})
def landscape(
    module: nn.Module,
    base: Source,
    models: Mapping[str, Source],
    tasks: Mapping[str, TaskInputs],
    *,
    points: Sequence[float] = POINTS,
    frozen: Sequence[str] = (),
    batch_size: int | Literal["auto"] = BATCH_SIZE,
    track: Track = untracked,
) -> Finding:
    """Accuracy of base + a τ_first + b τ_second over a grid of (a, b), for two models and their tasks.

    `values`: "accuracy" (task, a, b). Raises `ConfigError` unless there are two models.
    """
    if len(models) != 2:
        raise ConfigError(
            f"A landscape is of two models, found {len(models)}. Remedy: choose two with models=ONE,OTHER."
        )
    vectors = _task_vectors(base, models, tasks, frozen)
    module, named = copy.deepcopy(module), list(vectors.models)
    chosen = {name: tasks[name] for name in named}
    grid = [(a, b) for a in points for b in points]
    scores = [
        evaluate_row("", _loaded(module, state), chosen, batch_size=batch_size, track=track)
        for state in _combinations(vectors, torch.tensor(grid))
    ]
    rows = [(*point, *(row.on(name) for name in named), row.mean) for point, row in zip(grid, scores, strict=True)]
    accuracy = torch.tensor([[row.on(name) for row in scores] for name in named], dtype=torch.float64)
    values = {"accuracy": accuracy.reshape(len(named), len(points), len(points))}
    heads = (*(f"λ {name}" for name in named), *(f"on {name}" for name in named), "mean")
    title = f"accuracy between {' and '.join(named)}"
    return Finding("landscape", title, heads, rows, values, {"models": named, "points": list(points)})


def _task_vectors(base, models, tasks: Mapping[str, Any], frozen: Sequence[str]) -> TaskVectors:
    """The task vectors; raises `ConfigError` for a model without a task of its name."""
    vectors = open_task_vectors(base, models, frozen=frozen)
    if missing := [name for name in vectors.models if name not in tasks]:
        raise ConfigError(
            f"Model '{missing[0]}' has no task of its name. Remedy: add the task, or leave the model out."
        )
    return vectors


def _line(vectors: TaskVectors, names: Sequence[str], points: Sequence[float]) -> Iterator[dict[str, Tensor]]:
    some = TaskVectors(vectors.base, {n: vectors.models[n] for n in names}, vectors.frozen, vectors.threads)
    return _combinations(some, torch.tensor(points)[:, None].expand(-1, len(names)))


def _combinations(vectors: TaskVectors, weights: Float[Tensor, "point task"]) -> Iterator[dict[str, Tensor]]:
    """base + Σ weight · τ for each point, one after another in the same tensors, so that one merge is in memory."""
    merged = {name: vectors.base[name].clone() for name in vectors.specs}
    for point in weights:

        def write(piece, base, rows, point=point) -> None:
            merged[piece.name].view(-1)[piece.start : piece.stop] = base + point.to(rows.dtype) @ rows

        vectors.each_piece(vectors.names, write)
        yield merged | {alias: merged[name] for alias, name in vectors.base.aliases.items()}


def _loaded(module: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    if isinstance(module, Encoder):
        return module.load(state)
    module.load_state_dict(state)
    return module


@draws("interpolation")
def _interpolation_chart(finding: Finding) -> Chart:
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


@draws("landscape")
def _landscape_chart(finding: Finding) -> Chart:
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
