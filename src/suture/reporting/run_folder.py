"""A finished run, read from its folder: the plain data that `write` stored there, checked."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from suture.errors import ConfigError, shown
from suture.reporting.schema import load_points, load_report


@dataclass(frozen=True)
class FinishedRun:
    """The contents of a run's folder: `data` is report.json, `points` figures.json, `pictures` the SVG figures."""

    label: str
    data: Mapping[str, Any]
    points: Mapping[str, Any] = field(default_factory=dict)
    pictures: Sequence[Path] = ()


def read(folder: Path, label: str = "") -> FinishedRun:
    """Read a run's folder, also that of an earlier version.

    Raises `ConfigError` if there is no finished run, or if a file does not have a run's contents.
    """
    try:
        data = load_report(folder / "report.json")
    except FileNotFoundError:
        raise ConfigError(f"'{shown(folder)}' has no report.json. Remedy: name the folder of a finished run.") from None
    points = folder / "figures.json"
    pictures = sorted(path for path in (folder / "figures").glob("*.svg") if path.is_file())
    return FinishedRun(
        label or data["title"], _up_to_date(data), load_points(points) if points.exists() else {}, pictures
    )


def read_all(folders: Sequence[Path]) -> list[FinishedRun]:
    """Read several runs, labelled by the parts of their paths that differ."""
    return [read(folder, label) for folder, label in zip(folders, short_paths(folders), strict=True)]


def is_reference(row: Mapping[str, Any]) -> bool:
    """Whether a row is the pretrained model's or the experts'."""
    return row["role"] in ("pretrained", "experts")


def short_paths(folders: Sequence[Path]) -> list[str]:
    """The path of each folder without the common beginning and end of all.

    >>> short_paths([Path("out/ties/1"), Path("out/dare/1")])
    ['ties', 'dare']
    """
    parts = [folder.absolute().parts for folder in folders]
    if len({*parts}) < 2:
        return [folder.name or str(folder) for folder in folders]
    start = _agreeing(parts)
    end = _agreeing([part[start:][::-1] for part in parts])
    return ["/".join(part[start : len(part) - end]) or part[-1] for part in parts]


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) for every value of a nested configuration."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _up_to_date(data: dict[str, Any]) -> dict[str, Any]:
    """A report with defaults for the keys that earlier versions lack. Only here is meaning read from row names."""
    empty: dict[str, Any] = {"samples": {}, "command": "", "notes": [], "provenance": {}, "profile_seconds": {}}
    empty |= {"curves": {}, "matrix": {}, "learning": {}, "repairs": {}, "search": None, "seconds": {}, "memory": {}}
    empty |= {"circumstances": {}, "repeat": "", "seeds": {}}
    config = {"repair" if key == "surgery" else key: value for key, value in data.get("config", {}).items()}
    repairs = data.get("repairs", {})
    unknown = {"normalised_mean": None, "gap_closed": None, "needs_task": False, "learned": "", "split": ""}
    unknown |= {"added_parameters": 0, "routing": {}, "warnings": []}
    rows = [{**unknown, **_role_by_name(row["name"], repairs), **row} for row in data["rows"]]
    rows = [row | _of_repair(row, old, repairs) for row, old in zip(rows, data["rows"], strict=True)]
    return {**empty, **data, "config": config, "rows": rows}


def _of_repair(row: Mapping[str, Any], old: Mapping[str, Any], repairs: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a row's repair that the row itself does not have."""
    repair = repairs.get(row["name"].removesuffix(", routed"))
    known: dict[str, Any] = {"needs_task": row["role"] == "experts"}
    if repair is not None:
        split = repair.get("split")
        known = {"added_parameters": repair["added_parameters"], "split": split if isinstance(split, str) else ""}
        known["needs_task"] = repair["added_parameters"] > 0 and not row["routed"]
    return {key: value for key, value in known.items() if key not in old}


def _role_by_name(name: str, repairs: Mapping[str, Any]) -> dict[str, Any]:
    if name in ("pretrained", "experts"):
        return {"role": name, "repair": None, "merge": None, "routed": False}
    merge, plus, kind = name.rpartition(" + ")
    if not plus:
        return {"role": "merge", "repair": None, "merge": None, "routed": False}
    whole = name.removesuffix(", routed")
    kind = repairs[whole]["kind"] if whole in repairs else kind.split(",")[0].split()[0]
    return {"role": "repair", "repair": kind, "merge": merge, "routed": name.endswith(", routed")}


def _agreeing(parts: Sequence[Sequence[str]]) -> int:
    return next((i for i, level in enumerate(zip(*parts, strict=False)) if len(set(level)) > 1), min(map(len, parts)))
