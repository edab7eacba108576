"""Scores of a finished run with their 95% intervals: which rows stand out, and which of them are told apart."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from suture.evaluation import Interval, mean_interval, wilson
from suture.reporting.run_folder import is_reference

Data = Mapping[str, Any]


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

    Models are scored on the same inputs, so that two whose intervals overlap may still differ: this errs towards
    calling them equal.
    """
    known = [row for row in rows if _value(row, task) is not None]
    if not known:
        return []
    best = max(known, key=lambda row: _value(row, task))
    low = (interval(data, best, task) or (_value(best, task),))[0]
    return [best, *(row for row in known if row is not best and _high(data, row, task) >= low)]


def top_names(data: Data) -> dict[str, set[str]]:
    """Task, or "mean" → the names of the rows that are not told apart from the best merge or repair."""
    if data.get("metrics"):  # scores without intervals are not told apart at all
        return {task: set() for task in (*data["tasks"], "mean")}
    rows = scored(data)
    return {task: {row["name"] for row in leaders(data, rows, task)} for task in (*data["tasks"], "mean")}


def best_of_each_use(data: Data) -> Iterator[tuple[bool, list[Data]]]:
    """(whether the task's name must be given, the leading rows above the pretrained model) for each use that there is.

    The rows are empty if none is above the pretrained model.
    """
    pretrained = role(data, "pretrained")
    least = None if pretrained is None else pretrained["mean"]
    for named in (False, True):
        rows = [row for row in scored(data) if bool(row["needs_task"]) == named]
        if rows:
            yield named, leaders(data, [row for row in rows if least is None or row["mean"] > least])


def _value(row: Data, task: str) -> Any:
    return row["mean"] if task == "mean" else row["accuracies"].get(task)


def _high(data: Data, row: Data, task: str) -> float:
    known = interval(data, row, task)
    return _value(row, task) if known is None else known[1]


def _is_share(value: Any) -> bool:
    return value is not None and 0 <= value <= 1
