"""Scores of a finished run with their 95% intervals: which rows stand out, and which of them are told apart."""

from collections.abc import Iterator, Mapping, Sequence
from math import hypot
from typing import Any

from suture.evaluation import Interval, mean_interval, wilson
from suture.reporting.run_folder import is_reference

Data = Mapping[str, Any]
_Z = 1.959964  # standard errors on either side of a 95% interval


def interval(data: Data, row: Data, task: str) -> Interval | None:
    """The 95% interval of a row's accuracy on a task, or of its `mean`; None where it is not known.

    Scores that are no accuracies have none: their standard errors are shown instead.
    """
    metrics = data.get("metrics", {})
    if task in metrics or (task == "mean" and metrics):
        return None
    if task == "mean":
        known = {name: value for name, value in row["accuracies"].items() if value is not None}
        whole = len(known) == len(row["accuracies"]) and row["mean"] is not None
        return mean_interval(known, data["samples"]) if whole and all(map(_is_share, known.values())) else None
    value, count = row["accuracies"].get(task), data["samples"].get(task)
    return wilson(value, count) if count and _is_share(value) else None


def role(data: Data, name: str) -> Data | None:
    """The row of the pretrained model or of the experts."""
    return next((row for row in data["rows"] if row["role"] == name), None)


def scored(data: Data) -> list[Data]:
    """The rows of merges and repairs that have a mean."""
    return [row for row in data["rows"] if not is_reference(row) and row["mean"] is not None]


def leaders(data: Data, rows: Sequence[Data], task: str = "mean") -> list[Data]:
    """The best row on a task, or in the mean, first; then those whose intervals overlap with its own, in their order.

    The best row has the least score where less is better. Models are scored on the same inputs, so that two whose
    intervals overlap may still differ: this errs towards calling them equal.
    """
    known = [row for row in rows if _value(row, task) is not None]
    if not known:
        return []
    sign = -1 if _less_is_better(data, task) else 1
    best = max(known, key=lambda row: sign * _value(row, task))
    return [best, *(row for row in known if row is not best and overlap(data, best, row, task))]


def overlap(data: Data, one: Data, other: Data, task: str = "mean") -> bool:
    """Whether the 95% intervals of two rows overlap on a task, or in the mean; a score without one is exact."""
    (low, high), (least, most) = (_bounds(data, row, task) for row in (one, other))
    return low <= most and least <= high


def top_names(data: Data) -> dict[str, set[str]]:
    """Task, or "mean" → the names of the rows that are not told apart from the best merge or repair."""
    rows = [row for row in data["rows"] if not is_reference(row)]
    return {task: {row["name"] for row in leaders(data, rows, task)} for task in (*data["tasks"], "mean")}


def best_of_each_use(data: Data) -> Iterator[tuple[bool, list[Data]]]:
    """(whether the task's name must be given, the leading rows above the pretrained model) for each use that there is.

    The rows are empty if none is above the pretrained model. Where tasks have metrics, possibly in several units, the
    best row closes most of the gap, and rows are told apart if their intervals are on any task.
    """
    if data.get("metrics"):
        yield from _best_by_gap(data)
        return
    pretrained = role(data, "pretrained")
    least = None if pretrained is None else pretrained["mean"]
    for named in (False, True):
        rows = [row for row in scored(data) if bool(row["needs_task"]) == named]
        if rows:
            yield named, leaders(data, [row for row in rows if least is None or row["mean"] > least])


def _best_by_gap(data: Data) -> Iterator[tuple[bool, list[Data]]]:
    for named in (False, True):
        rows = [row for row in data["rows"] if not is_reference(row) and bool(row["needs_task"]) == named]
        rows = [row for row in rows if row["gap_closed"] is not None]
        above = sorted((row for row in rows if row["gap_closed"] > 0), key=lambda row: -row["gap_closed"])
        if rows:
            yield named, [row for row in above if all(overlap(data, above[0], row, task) for task in _common(above))]


def _common(rows: Sequence[Data]) -> list[str]:
    """The tasks on which all rows have a score."""
    return [task for task in rows[0]["accuracies"] if all(_value(row, task) is not None for row in rows)]


def _less_is_better(data: Data, task: str) -> bool:
    metrics = data.get("metrics", {})
    known = metrics.values() if task == "mean" else [metrics.get(task, {})]  # a mean has one unit
    return any(each.get("lower", False) for each in known)


def _value(row: Data, task: str) -> Any:
    return row["mean"] if task == "mean" else row["accuracies"].get(task)


def _error(row: Data, task: str) -> float:
    """The standard error of a score, or of the mean over tasks; 0 where it is not known."""
    errors = {name: value for name, value in row.get("errors", {}).items() if value is not None}
    if task != "mean":
        return errors.get(task, 0.0)
    whole = len(errors) == len(row["accuracies"])
    return hypot(*errors.values()) / len(errors) if whole and errors else 0.0


def _bounds(data: Data, row: Data, task: str) -> tuple[float, float]:
    """The interval by which a score is told apart from others: Wilson's, or 1.96 standard errors on either side."""
    value, width = _value(row, task), _Z * _error(row, task)
    low, high = interval(data, row, task) or (value - width, value + width)
    return low, high


def _is_share(value: Any) -> bool:
    return value is not None and 0 <= value <= 1
