"""Published figures: the commands that reproduce them, and comparison with finished runs.

The figures are in `published.yaml`: those of Representation Surgery (https://arxiv.org/abs/2402.02705) for the authors'
checkpoints, and those of FusionBench (https://arxiv.org/abs/2406.03280) for the checkpoints on the hub.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from suture.errors import ConfigError

_PATHS = {"cache_dir", "save_merging_weights"}  # keys that do not affect a figure


@dataclass(frozen=True)
class Published:
    """One published mean accuracy (in %), the arguments of the run that reproduces it, and its row in the report."""

    id: str
    words: tuple[str, ...]
    row: str
    mean: float
    tolerance: float

    @property
    def command(self) -> str:
        """The command that reproduces the figure."""
        return f"suture {' '.join(self.words)}"


@dataclass(frozen=True)
class Compared:
    """A published figure and that of a run, both in %."""

    published: Published
    found: float

    @property
    def within(self) -> bool:
        """Whether the two differ by no more than the tolerance."""
        return abs(self.found - self.published.mean) <= self.published.tolerance + 1e-9


@cache
def published() -> tuple[Published, ...]:
    """All published figures with a known command."""
    import yaml

    data = yaml.safe_load((files("suture.pipeline") / "published.yaml").read_text("utf-8"))
    return tuple(
        Published(**{**row, "words": (*row["words"].split(), *family["pools"].split())})
        for family in data["families"].values()
        for row in family["rows"]
    )


def compare(report: str | Path) -> list[Compared]:
    """The published figures for a run's pools, method and repair, compared with its own.

    `report` is a run's folder or its `report.json`. Raises `ConfigError` if it is neither.
    """
    path = Path(report)
    path = path / "report.json" if path.is_dir() else path
    try:
        data = json.loads(path.read_text("utf-8"))
        means = {row["name"]: row["mean"] for row in data["rows"]}
        config = data["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"'{report}' holds no report of a run ({type(error).__name__}).") from None
    return [
        Compared(figure, 100 * means[figure.row])
        for figure in published()
        if figure.row in means and _same_run(figure, config)
    ]


def _same_run(figure: Published, config: Mapping[str, Any]) -> bool:
    from suture.pipeline.config import compose

    expected = compose(figure.words)
    chosen = config.get("choices") or {}
    pools = [str(chosen.get(group, "")).split("/")[-1] for group in ("modelpool", "taskpool")]
    arguments = dict(argument.split("=", 1) for argument in figure.words)
    expected_pools = [arguments[group].split("/")[-1] for group in ("modelpool", "taskpool")]
    if pools != expected_pools or figure.row in ("pretrained", "experts"):
        return pools == expected_pools
    return all(_decisive(expected[group]) == _decisive(config.get(group) or {}) for group in ("method", "repair"))


def _decisive(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in _PATHS}
