"""A finished run, read back from its folder: the same plain data that `write` left there."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from suture.errors import ConfigError


@dataclass(frozen=True)
class Finished:
    """One run as its folder has it: `data` is report.json, `points` figures.json, `pictures` the SVG of each figure."""

    label: str
    data: Mapping[str, Any]
    points: Mapping[str, Any] = field(default_factory=dict)
    pictures: Sequence[Path] = ()


def read(folder: Path, label: str = "") -> Finished:
    """Read a run's folder; raises `ConfigError` where there is no finished run. Older runs have no points."""
    try:
        data = json.loads((folder / "report.json").read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"'{folder}' has no report.json. Remedy: name the folder of a finished run.") from None
    except ValueError as error:
        raise ConfigError(f"'{folder / 'report.json'}' is not what a run leaves ({error}).") from None
    if not isinstance(data, dict) or not {"title", "rows", "tasks"} <= set(data):
        raise ConfigError(f"'{folder / 'report.json'}' is not what a run leaves. Remedy: name the folder of a run.")
    points = folder / "figures.json"
    return Finished(
        label or data["title"],
        data,
        json.loads(points.read_text("utf-8")) if points.is_file() else {},
        sorted((folder / "figures").glob("*.svg")),
    )


def read_all(folders: Sequence[Path]) -> list[Finished]:
    """Read several runs; their labels are the parts of their paths in which they differ."""
    return [read(folder, label) for folder, label in zip(folders, short_names(folders), strict=True)]


def short_names(folders: Sequence[Path]) -> list[str]:
    """The path of each folder without what all of them begin and end with.

    >>> short_names([Path("out/ties/1"), Path("out/dare/1")])
    ['ties', 'dare']
    """
    parts = [folder.absolute().parts for folder in folders]
    if len({*parts}) < 2:
        return [folder.name or str(folder) for folder in folders]
    start = _agreeing(parts)
    end = _agreeing([part[start:][::-1] for part in parts])
    return ["/".join(part[start : len(part) - end]) or part[-1] for part in parts]


def _agreeing(parts: Sequence[Sequence[str]]) -> int:
    return next((i for i, level in enumerate(zip(*parts, strict=False)) if len(set(level)) > 1), min(map(len, parts)))


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a nested configuration with its dotted key."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
