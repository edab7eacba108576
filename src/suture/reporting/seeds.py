"""Runs that differ only in their seed: the mean of each row over them, with its 95% interval."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from suture.evaluation import over_seeds
from suture.reporting.run_folder import flat, is_reference

Data = Mapping[str, Any]
_APART = ("output", "overwrite", "reuse", "command", "choices.", "hydra")  # keys that do not affect results


def by_seed(runs: Sequence[Data]) -> dict[str, list[dict[str, float]]]:
    """Row → its accuracies in each of several runs that are alike but for their seeds; empty if there are none."""
    groups: dict[str, list[Data]] = {}
    for run in runs:
        groups.setdefault(_without_seed(run["config"]), []).append(run)
    several = [group for group in groups.values() if len({seed_of(run) for run in group}) > 1]
    rows: dict[str, list[dict[str, float]]] = {}
    for number, group in enumerate(several):
        first = {seed_of(run): run for run in reversed(group)}
        for seed in sorted(first, key=str):
            for row in first[seed]["rows"]:
                if not is_reference(row):
                    name = row["name"] if len(several) == 1 else f"{row['name']} (group {number + 1})"
                    rows.setdefault(name, []).append(dict(row["accuracies"]))
    return {name: accuracies for name, accuracies in rows.items() if len(accuracies) > 1}


def seed_of(run: Data) -> Any:
    """The seed of a run's configuration."""
    return run["config"].get("seed")


def seeds_table(data: Data) -> str:
    """HTML: for each row that ran with several seeds, mean ± half of the 95% interval, by task and in the mean."""
    if not data["seeds"]:
        return ""
    tasks = data["tasks"]
    head = "".join(f"<th scope=col>{escape(name)}</th>" for name in ("model", "seeds", *tasks, "mean"))
    body = "".join(_line(name, rows, tasks) for name, rows in data["seeds"].items() if rows)
    about = "Mean over seeds ± half of its 95% interval (Student's t), in %: how much the seed alone changes."
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<section><h2>Over seeds</h2><div class=wide>{table}</div><p class=note>{about}</p></section>"


def _line(name: str, rows: Sequence[Mapping[str, float | None]], tasks: Sequence[str]) -> str:
    complete = [known for row in rows if len(known := {t: v for t, v in row.items() if v is not None}) == len(row)]
    columns = [[row[task] for row in complete if task in row] for task in tasks]
    columns.append([sum(row.values()) / len(row) for row in complete if row])
    cells = "".join(f"<td>{_cell(column)}</td>" for column in columns)
    return f"<tr><th scope=row>{escape(name)}</th><td>{len(rows)}</td>{cells}</tr>"


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean, half = over_seeds(values)
    return f"{100 * mean:.1f} ± {100 * half:.1f}" if half == half else f"{100 * mean:.1f}"


def _without_seed(config: Data) -> str:
    kept = {k: v for k, v in flat(config) if not k.startswith(_APART) and k.rpartition(".")[2] != "seed"}
    return str(sorted(map(str, kept.items())))
