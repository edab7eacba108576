"""The schemas of report.json and figures.json, checked on reading: numbers are numbers, names are text.

Other keys are passed through, and are only ever shown as text.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from annotated_types import Ge, Le, Len
from typing_extensions import TypedDict

from suture.errors import ConfigError, shown

_LARGEST = 256 << 20  # bytes of a file
_DEEPEST = 64  # levels of nested lists and objects

Number = Annotated[float, Ge(-1e300), Le(1e300)]
Count = Annotated[int, Ge(0), Le(1 << 62)]
Scores = dict[str, Number | None]  # step → mean accuracy
Table = dict[str, dict[str, Number | None]]  # task → layer


class RowData(TypedDict):
    """A row of the accuracy table."""

    name: str
    accuracies: dict[str, Number | None]
    mean: Number | None
    errors: NotRequired[dict[str, Number | None]]
    details: NotRequired[dict[str, dict[str, Annotated[list[Number | None], Len(2, 2)]]]]
    normalised_mean: NotRequired[Number | None]
    gap_closed: NotRequired[Number | None]
    role: NotRequired[Literal["pretrained", "experts", "merge", "repair"]]
    repair: NotRequired[str | None]
    merge: NotRequired[str | None]
    routed: NotRequired[bool]
    needs_task: NotRequired[bool]
    learned: NotRequired[str]
    split: NotRequired[str]
    added_parameters: NotRequired[Count]
    routing: NotRequired[dict[str, Number | None]]
    warnings: NotRequired[list[str]]


class MetricData(TypedDict):
    """The score of a task: its name, whether less is better, and whether it is a share."""

    name: str
    lower: bool
    share: bool


class LearningData(TypedDict):
    """The learned coefficients of one method."""

    tasks: list[str]
    layers: list[str] | None
    coefficients: list[Number | None] | list[list[Number | None]]
    scores: Scores
    warnings: NotRequired[list[str]]


class DistancesData(TypedDict):
    """Task → layer → distance."""

    l1: Annotated[Table, Len(1)]
    cka: Annotated[Table, Len(1)]


class RepresentationData(TypedDict):
    """Distances to the experts before and after a repair."""

    before: DistancesData
    after: DistancesData


class RepairData(TypedDict):
    """A repair's cost and effect."""

    kind: str
    added_parameters: Count
    encoders_at_inference: Count
    inputs_encoded: dict[str, Count]
    steps: Count
    first_loss: dict[str, Number]
    last_loss: dict[str, Number]
    warnings: list[str]
    scores: Scores
    representation: NotRequired[RepresentationData]


class TrialData(TypedDict):
    """One point of a search, knob → value, and its score."""

    point: dict[str, Number]
    score: Number | None


class SearchData(TypedDict):
    """The trials of a search, and the score and inputs that they were compared by; `best` is the number of one."""

    score: str
    split: str
    num_inputs: Count
    labels: bool
    best: Count
    trials: Annotated[list[TrialData], Len(1)]


class HardwareData(TypedDict):
    """The machine of a run."""

    processor: str
    cores: Count
    threads: Count
    accelerators: list[str]


class CircumstancesData(TypedDict):
    """Date, commit, hardware and peak memory in bytes."""

    date: NotRequired[str]
    commit: NotRequired[str]
    hardware: NotRequired[HardwareData]
    peak_memory: NotRequired[dict[str, Count]]


class ReportData(TypedDict):
    """report.json."""

    title: str
    tasks: list[str]
    rows: list[RowData]
    samples: NotRequired[dict[str, Count]]
    metrics: NotRequired[dict[str, MetricData]]
    harness: NotRequired[dict[str, Any] | None]
    generations: NotRequired[list[dict[str, Any]]]
    command: NotRequired[str]
    curves: NotRequired[dict[str, dict[str, list[Annotated[list[Number], Len(2, 2)]]]]]
    matrix: NotRequired[dict[str, dict[str, Number | None]]]
    search: NotRequired[SearchData | None]
    seconds: NotRequired[dict[str, Number]]
    memory: NotRequired[dict[str, Count]]
    learning: NotRequired[dict[str, LearningData]]
    repairs: NotRequired[dict[str, RepairData]]
    profile_seconds: NotRequired[dict[str, Annotated[float, Ge(0), Le(1e12)]]]
    notes: NotRequired[list[str]]
    circumstances: NotRequired[CircumstancesData]
    repeat: NotRequired[str]
    seeds: NotRequired[dict[str, list[dict[str, Number | None]]]]
    config: NotRequired[dict[str, Any]]
    provenance: NotRequired[dict[str, Any]]


class CoefficientCurves(TypedDict):
    """Steps, and per task the mean, the lowest and the highest coefficient at each."""

    steps: list[Count]
    mean: dict[str, list[Number | None]]
    low: dict[str, list[Number | None]]
    high: dict[str, list[Number | None]]


class ObjectiveCurve(TypedDict):
    """The objective at each step."""

    steps: list[Count]
    loss: list[Number | None]


class ScatterSides(TypedDict):
    """Points of each model."""

    merged: list[Annotated[list[Number], Len(2, 2)]]
    repaired: list[Annotated[list[Number], Len(2, 2)]]
    expert: list[Annotated[list[Number], Len(2, 2)]]


class PointsData(TypedDict):
    """figures.json."""

    learning: NotRequired[dict[str, CoefficientCurves]]
    objective: NotRequired[dict[str, ObjectiveCurve]]
    scatter: NotRequired[dict[str, dict[str, ScatterSides]]]
    explained: NotRequired[dict[str, dict[str, Annotated[list[Number], Len(2, 2)] | Number]]]


def load_report(path: Path) -> dict[str, Any]:
    """report.json, checked; raises `ConfigError` with file and key if it does not fit."""
    data = _checked(ReportData, path)
    for name, learned in data.get("learning", {}).items():
        _check_coefficients(path, name, learned)
    for name, repair in data.get("repairs", {}).items():
        _check_steps(path, f"repairs.{name}", repair["scores"])
        if "representation" in repair:
            _check_tables(path, name, repair["representation"])
    return data


def load_points(path: Path) -> dict[str, Any]:
    """figures.json, checked; raises `ConfigError` with file and key if it does not fit."""
    data = _checked(PointsData, path)
    for name, curves in data.get("learning", {}).items():
        lengths = [len(curve) for side in ("mean", "low", "high") for curve in curves[side].values()]
        same_tasks = set(curves["mean"]) == set(curves["low"]) == set(curves["high"])
        if not same_tasks or {*lengths, len(curves["steps"])} != {len(curves["steps"])}:
            raise _refusal(path, f"learning.{name}", "curves need one number for each step and the same tasks")
    for name, curve in data.get("objective", {}).items():
        if len(curve["steps"]) != len(curve["loss"]):
            raise _refusal(path, f"objective.{name}", "needs one loss for each step")
    for name, tasks in data.get("scatter", {}).items():
        if not set(tasks) <= set(data.get("explained", {}).get(name, ())):
            raise _refusal(path, f"explained.{name}", "needs a number for each task of the scatter")
    return data


def _check_coefficients(path: Path, name: str, learned: Mapping[str, Any]) -> None:
    shape = [len(learned["tasks"])] + ([len(learned["layers"])] if learned["layers"] else [])
    if _shape(learned["coefficients"]) != shape:
        expected = "one for each task" + (" and layer" if learned["layers"] else "")
        raise _refusal(path, f"learning.{name}.coefficients", f"wanted {expected}")
    _check_steps(path, f"learning.{name}", learned["scores"])


def _shape(values: Sequence[Any]) -> list[int] | None:
    """The lengths of equal lists in a list; None for a ragged one."""
    if not all(isinstance(value, list) for value in values):
        return None if any(isinstance(value, list) for value in values) else [len(values)]
    lengths = {len(value) for value in values}
    return [len(values), *lengths] if len(lengths) == 1 else None


def _check_steps(path: Path, key: str, scores: Mapping[str, float]) -> None:
    for step in scores:
        if not (step.isascii() and step.isdecimal() and len(step) < 18):
            raise _refusal(path, f"{key}.scores", f"{shown(step)!r} is not a step")


def _check_tables(path: Path, name: str, representation: Mapping[str, Any]) -> None:
    tables = [representation[when][key] for when in ("before", "after") for key in ("l1", "cka")]
    layouts = {tuple((task, tuple(sorted(line))) for task, line in sorted(table.items())) for table in tables}
    layers = {line for layout in layouts for _, line in layout}
    if len(layouts) != 1 or len(layers) != 1 or not next(iter(layers)):
        raise _refusal(path, f"repairs.{name}.representation", "its tables need the same tasks and layers")


def _checked(shape: Any, path: Path) -> dict[str, Any]:
    from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

    strict = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    adapter = TypeAdapter(with_config(strict)(shape))
    try:
        return adapter.validate_python(_loaded(path))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise _refusal(path, _key(first["loc"]), first["msg"][:1].lower() + first["msg"][1:]) from None


def _loaded(path: Path) -> Any:
    """The JSON of a file, with limits on size and depth; NaN and Infinity become null."""
    if path.exists() and not path.is_file():
        raise ConfigError(f"'{shown(path)}' is not a file. Remedy: name the folder of a finished run.")
    try:
        with path.open("rb") as file:
            text = file.read(_LARGEST + 1)
        if len(text) > _LARGEST:
            raise ValueError(f"larger than {_LARGEST >> 20} MiB")
        data = json.loads(text, parse_constant=lambda _: None)
        _check_depth(data)
        json.dumps(data, ensure_ascii=False).encode("utf-8")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(f"'{shown(path)}' cannot be read: {error.strerror}. Remedy: check its permissions.") from None
    except UnicodeEncodeError:
        raise _refusal(path, "", "holds text that is not Unicode") from None
    except (ValueError, RecursionError) as error:
        raise _refusal(path, "", f"is not valid JSON: {shown(error)}") from None
    return data


def _check_depth(data: Any) -> None:
    level = [data]
    for _ in range(_DEEPEST):
        level = [
            inner
            for value in level
            if isinstance(value, list | dict)
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise ValueError(f"nested deeper than {_DEEPEST} levels")


def _key(location: Sequence[str | int]) -> str:
    """The path of a value in usual notation: rows[0].name."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")


def _refusal(path: Path, key: str, problem: str) -> ConfigError:
    where = f"{shown(key)}: " if key else ""
    return ConfigError(
        f"'{shown(path)}' is not what a run leaves: {where}{shown(problem)}. Remedy: name a finished run."
    )
