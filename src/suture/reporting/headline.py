"""The first lines of a page: the best model without the task's name, and the best with it."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from suture.reporting.data import percent
from suture.reporting.glossary import explained
from suture.reporting.run_folder import is_reference
from suture.reporting.scores import best_of_each_use, interval, overlap, role


def headline(data: Mapping[str, Any]) -> str:
    """The best without the task's name and the best with it, with all that is not told apart, and the references."""
    lines = [_best(data, named, leaders) for named, leaders in best_of_each_use(data)]
    references = [(row["name"], _percents(row["mean"])) for row in data["rows"] if is_reference(row)]
    compared = "" if data.get("metrics") else "; ".join(f"{explained(name)} {value}" for name, value in references)
    whole = "".join(f"<p class=lead>{line}</p>" for line in lines)
    return whole + (f"<p class=note>{compared}.</p>" if whole and compared else "")


def _best(data: Mapping[str, Any], named: bool, leaders: Sequence[Mapping[str, Any]]) -> str:
    use = "Best with the task's name" if named else "Best without the task's name"
    if not leaders:
        return f"{use}: nothing is above the pretrained model."
    best, *others = leaders
    bounds = interval(data, best, "mean")
    between = f" ({'–'.join(map(percent, bounds))})" if bounds else ""
    closed = "" if best["gap_closed"] is None else f", {_percents(best['gap_closed'])} of the gap closed"
    mean = "" if data.get("metrics") else f", {_percents(best['mean'])}{between}"
    sentence = f"{use}: <strong>{escape(best['name'])}</strong>{mean}{closed}{_split(best)}."
    key = "gap_closed" if data.get("metrics") else "mean"
    equal = [f"{escape(row['name'])} {_percents(row[key])}{_split(row)}" for row in others]
    equal += ["the pretrained model"] * _is_pretrained(data, best)
    return sentence + (f" <span class=note>Not told apart from it: {'; '.join(equal)}.</span>" if equal else "")


def _is_pretrained(data: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Whether a row is not told apart from the pretrained model on any task, or in the mean where there is one."""
    base = role(data, "pretrained")
    if base is None:
        return False
    tasks = data["tasks"] if data.get("metrics") else ["mean"]
    known = [t for t in tasks if t == "mean" or None not in (row["accuracies"].get(t), base["accuracies"].get(t))]
    return bool(known) and all(overlap(data, row, base, task) for task in known)


def _split(row: Mapping[str, Any]) -> str:
    return f", learned from the {escape(row['split'])} split" if row["split"] and row["learned"] else ""


def _percents(value: float | None) -> str:
    return f"{percent(value)}\N{NO-BREAK SPACE}%"
