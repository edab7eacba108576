"""figures.json: the points of curves and scatter plots, thinned to what is visible."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from suture.adaptation import AdaMergingResult
from suture.repairs import Representation
from suture.reporting.data import Report

_STEPS = 200  # at most, in a curve
_INPUTS = 128  # at most, for each task of a scatter plot


def points_of(report: Report) -> dict[str, Any]:
    """The contents of figures.json: curves of what was learned, and the scatter plot of each repair.

    `learning`: name → steps, and per task the mean, the lowest and the highest coefficient over layers at each;
    `objective`: name → steps and losses; `scatter`: name → task → model → [x, y] of each input; `explained`: name →
    task → the share of the variance along each axis of the plot.
    """
    compared = {name: r.representation for name, r in report.repairs.items() if r.representation is not None}
    return {
        "learning": {name: _coefficients(learning) for name, learning in report.learning.items()},
        "objective": {name: _losses(learning.losses) for name, learning in report.learning.items()},
        "scatter": {name: _scatter(representation) for name, representation in compared.items()},
        "explained": {
            name: {task: list(shares) for task, shares in representation.explained.items()}
            for name, representation in compared.items()
        },
    }


def _coefficients(learning: AdaMergingResult) -> dict[str, Any]:
    history = learning.history if learning.coefficients.layers else learning.history[..., None]
    history = history.reshape(len(history), len(learning.coefficients.tasks), -1)
    taken = _thinned(len(history), _STEPS)
    sides = {"mean": history.mean(2), "low": history.amin(2), "high": history.amax(2)}
    curves = {
        side: dict(zip(learning.coefficients.tasks, map(_rounded, values[taken].T), strict=True))
        for side, values in sides.items()
    }
    return {"steps": taken, **curves}


def _losses(losses: Tensor) -> dict[str, Any]:
    """The losses, each the mean from its step to the next that is kept."""
    taken = _thinned(len(losses), _STEPS)
    ends = [*taken[1:], len(losses)][: len(taken)]  # empty if there are no steps
    return {"steps": taken, "loss": [_number(losses[a:b].mean()) for a, b in zip(taken, ends, strict=True)]}


def _scatter(representation: Representation) -> dict[str, Mapping[str, Any]]:
    sides_of = representation.scatter.items()
    return {task: {name: _points(points) for name, points in sides.items()} for task, sides in sides_of}


def _points(points: Tensor) -> list[list[float]]:
    return [_rounded(point) for point in points[_thinned(len(points), _INPUTS)]]


def _thinned(length: int, most: int) -> list[int]:
    """At most `most` evenly spread indices of a sequence, including the first and the last."""
    if length <= most:
        return list(range(length))
    return [round(i * (length - 1) / (most - 1)) for i in range(most)]


def _rounded(values: Tensor) -> list[float]:
    return [_number(value) for value in values]


def _number(value: Tensor) -> float:
    return float(f"{value.item():.4g}")
