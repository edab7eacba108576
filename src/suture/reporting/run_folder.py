"""A finished run, read back from its folder: the same plain data that `write` left there, checked."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from suture.errors import ConfigError, shown
from suture.reporting.schema import load_points, load_report


@dataclass(frozen=True)
class Finished:
    """One run as its folder has it: `data` is report.json, `points` figures.json, `pictures` the SVG of each figure."""

    label: str
    data: Mapping[str, Any]
    points: Mapping[str, Any] = field(default_factory=dict)
    pictures: Sequence[Path] = ()


def read(folder: Path, label: str = "") -> Finished:
    """Read a run's folder, also one of an earlier version.

    Raises `ConfigError` where there is no finished run, or a file holds something else than a run leaves there.
    """
    try:
        data = load_report(folder / "report.json")
    except FileNotFoundError:
        raise ConfigError(f"'{shown(folder)}' has no report.json. Remedy: name the folder of a finished run.") from None
    points = folder / "figures.json"
    pictures = sorted(path for path in (folder / "figures").glob("*.svg") if path.is_file())
    return Finished(label or data["title"], _up_to_date(data), load_points(points) if points.exists() else {}, pictures)


def read_all(folders: Sequence[Path]) -> list[Finished]:
    """Read several runs; their labels are the parts of their paths in which they differ."""
    return [read(folder, label) for folder, label in zip(folders, short_paths(folders), strict=True)]


def is_reference(row: Mapping[str, Any]) -> bool:
    """Whether a row is one to compare with: the pretrained model or the experts."""
    return row["role"] in ("pretrained", "experts")


def short_paths(folders: Sequence[Path]) -> list[str]:
    """The path of each folder without what all of them begin and end with.

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
    """Every value of a nested configuration with its dotted key."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _up_to_date(data: dict[str, Any]) -> dict[str, Any]:
    """What a report of an earlier version lacks, filled in; the only place that reads meaning out of names."""
    empty: dict[str, Any] = {"samples": {}, "command": "", "notes": [], "provenance": {}, "profile_seconds": {}}
    empty |= {"curves": {}, "matrix": {}, "learning": {}, "repairs": {}}
    config = {"repair" if key == "surgery" else key: value for key, value in data.get("config", {}).items()}
    repairs = data.get("repairs", {})
    unknown = {"normalised_mean": None, "gap_closed": None}
    rows = [{**unknown, **_role_by_name(row["name"], repairs), **row} for row in data["rows"]]
    return {**empty, **data, "config": config, "rows": rows}


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
