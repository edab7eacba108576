"""Warnings about the models of a table: where one harms, and why a router fails."""

from collections.abc import Iterator, Mapping
from typing import Any

from suture.reporting.run_folder import is_reference
from suture.reporting.scores import interval, role, scored

Data = Mapping[str, Any]
_FEW = 4  # tasks that a line names


def harms(data: Data) -> list[str]:
    """One line for each: rows below the pretrained model, weak routers, and the warnings of rows, fits and repairs."""
    lines = [*_below(data), *_routers(data)]
    for row in data["rows"]:
        lines += [f"{row['name']}: {line}" for line in row["warnings"]]
    for part in ("learning", "repairs"):
        for name, made in data[part].items():
            lines += [f"{name}: {line}" for line in made.get("warnings", ())]
    return list(dict.fromkeys(lines))


def _below(data: Data) -> Iterator[str]:
    """Rows that are below the pretrained model in the mean, or on some task by more than both intervals."""
    base = role(data, "pretrained")
    if data.get("metrics"):
        for row in data["rows"]:
            if not is_reference(row) and row["gap_closed"] is not None and row["gap_closed"] < 0:
                yield f"{row['name']} is below the pretrained model: gap closed {100 * row['gap_closed']:.1f} %."
        return
    if base is None or base["mean"] is None:
        return
    for row in scored(data):
        worse = [task for task in data["tasks"] if _is_worse(data, row, base, task)]
        if row["mean"] < base["mean"]:
            yield (
                f"{row['name']} is below the pretrained model: {100 * row['mean']:.1f} % against "
                f"{100 * base['mean']:.1f} % in the mean. Do not use it."
            )
        elif worse:
            points = {task: 100 * (base["accuracies"][task] - row["accuracies"][task]) for task in worse}
            losses = [f"{task} ({loss:.1f} points)" for task, loss in points.items()]
            more = f" and {len(losses) - _FEW} more" if len(losses) > _FEW else ""
            yield f"{row['name']} is below the pretrained model on {', '.join(losses[:_FEW])}{more}."


def _is_worse(data: Data, row: Data, base: Data, task: str) -> bool:
    own, other = interval(data, row, task), interval(data, base, task)
    return own is not None and other is not None and own[1] < other[0]


def _routers(data: Data) -> Iterator[str]:
    """Routed rows that lose to the merge that they start from, and tasks whose inputs mostly go elsewhere."""
    by_name = {row["name"]: row for row in data["rows"]}
    for row in scored(data):
        if not row["routed"]:
            continue
        merge = by_name.get(row["merge"])
        if merge is not None and merge["mean"] is not None and row["mean"] < merge["mean"]:
            loss = f"{100 * row['mean']:.1f} % against {100 * merge['mean']:.1f} %"
            yield f"{row['name']} is below its merge without a repair: {loss}. The router harms; give the task's name."
        shares = {task: share for task, share in row["routing"].items() if share is not None and share < 0.5}
        if shares:
            lost = ", ".join(f"{task} {100 * share:.0f} %" for task, share in list(shares.items())[:_FEW])
            more = f" and {len(shares) - _FEW} more" if len(shares) > _FEW else ""
            yield f"{row['name']}: the router finds the right task for less than half of the inputs: {lost}{more}."
