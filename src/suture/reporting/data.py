"""The contents of a report, from which all its forms are made. `Report.as_data()` is report.json."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from suture.adaptation import AdaMergingResult
from suture.core.names import in_bytes
from suture.core.notebooks import frame, table_html
from suture.evaluation import Row
from suture.evaluation.metrics import ACCURACY, metric
from suture.repairs import RepairResult, Representation

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Report:
    """Accuracies of several models on the same tasks, and the information to repeat the run.

    `pretrained` and `experts` are among the `rows`; without them there is no gap to report. `curves`: knob → model →
    value of the knob → mean accuracy. `matrix`: a row per expert, on every task. `profile`: activity → seconds.
    `search`: the trials of a search for knobs, and the score and inputs that they were compared by. `circumstances`:
    date, commit, hardware and peak memory. `command` is the command as it was given; `repeat` repeats the run from
    inside its folder. `seeds`: name → a row for each seed. `harness`: versions, settings and results of an evaluation
    harness. `generations`: prompts, and their continuations by model.
    """

    title: str
    rows: Sequence[Row]
    pretrained: Row | None = None
    experts: Row | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    profile: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()
    command: str = ""
    curves: Mapping[str, Mapping[str, Mapping[float, float]]] = field(default_factory=dict)
    learning: Mapping[str, AdaMergingResult] = field(default_factory=dict)
    repairs: Mapping[str, RepairResult] = field(default_factory=dict)
    matrix: Sequence[Row] = ()
    search: Mapping[str, Any] | None = None
    circumstances: Mapping[str, Any] = field(default_factory=dict)
    repeat: str = ""
    seeds: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    harness: Mapping[str, Any] | None = None
    generations: Sequence[Mapping[str, Any]] = ()

    def __repr__(self) -> str:
        return f"Report({self.title!r}, {len(self.rows)} models, {len(self.tasks)} tasks)"

    def to_pandas(self) -> "DataFrame":
        """The accuracy table: one row for each model, in [0, 1], with mean, share of the experts' and gap closed."""
        heads = ["model", *self.tasks, "mean", "normalised_mean", "gap_closed"]
        rows = [
            (row.name, *map(row.accuracies.get, self.tasks), row.mean, self.normalised(row), self.gap_closed(row))
            for row in self.rows
        ]
        return frame(heads, rows, index="model")

    def _repr_html_(self) -> str:
        heads = ["model", *columns(self)[1:]]
        return table_html(
            heads, [cells(self, row) for row in self.rows], f"{self.title}: {unit_of(self.tasks, self.metrics)}"
        )

    @property
    def tasks(self) -> list[str]:
        """The tasks in the order of the pool."""
        return list(dict.fromkeys(task for row in self.rows for task in row.accuracies))

    @property
    def samples(self) -> dict[str, int]:
        """Task → the number of test inputs that it was scored on."""
        return {task: count for row in self.rows for task, count in row.samples.items()}

    @property
    def metrics(self) -> dict[str, str]:
        """Task → the name of its score, of the tasks whose score is no accuracy."""
        return {task: name for row in self.rows for task, name in row.metrics.items()}

    def normalised(self, row: Row) -> float:
        """Mean over tasks of accuracy / expert accuracy; nan without experts."""
        return row.normalised_mean(self.experts) if self.experts else math.nan

    def gap_closed(self, row: Row) -> float:
        """(row − pretrained) / (experts − pretrained) of the means; nan without either."""
        if self.pretrained is None or self.experts is None:
            return math.nan
        return row.gap_closed(self.pretrained, self.experts)

    def as_data(self) -> dict[str, Any]:
        """The report as JSON data, with null for unknown values."""
        return {
            "title": self.title,
            "command": self.command,
            "tasks": self.tasks,
            "samples": self.samples,
            "metrics": {task: metric(name)._asdict() for task, name in self.metrics.items()},
            "rows": [self._row_as_data(row) for row in self.rows],
            "curves": {
                knob: {n: list(map(list, c.items())) for n, c in cs.items()} for knob, cs in self.curves.items()
            },
            "matrix": {row.name: dict(row.accuracies) for row in self.matrix},
            "learning": {name: learning_data(learned) for name, learned in self.learning.items()},
            "repairs": {name: repair_data(fitted) for name, fitted in self.repairs.items()},
            "seconds": {row.name: row.seconds for row in self.rows if row.seconds is not None},
            "memory": {row.name: row.memory for row in self.rows if row.memory is not None},
            "search": None if self.search is None else dict(self.search),
            "harness": None if self.harness is None else dict(self.harness),
            "generations": [dict(each) for each in self.generations],
            "profile_seconds": dict(self.profile),
            "notes": list(self.notes),
            "circumstances": dict(self.circumstances),
            "repeat": self.repeat,
            "seeds": {name: [dict(row.accuracies) for row in rows] for name, rows in self.seeds.items()},
            "config": dict(self.config),
            "provenance": dict(self.provenance),
        }

    def _row_as_data(self, row: Row) -> dict[str, Any]:
        return {
            "name": row.name,
            "role": row.role,
            "merge": row.merge,
            "repair": row.repair,
            "routed": row.routed,
            "needs_task": row.needs_task,
            "learned": row.learned,
            "split": row.split,
            "added_parameters": row.added_parameters,
            "routing": dict(row.routing),
            "warnings": list(row.warnings),
            "accuracies": dict(row.accuracies),
            "errors": dict(row.errors),
            "details": {task: {n: list(pair) for n, pair in each.items()} for task, each in row.details.items()},
            "mean": _known(row.mean),
            "mean_interval": list(row.mean_interval) if row.mean_interval else None,
            "intervals": {
                task: list(bounds)
                for task in row.accuracies
                if row.samples.get(task) and (bounds := row.interval(task)) is not None
            },
            "normalised_mean": _known(self.normalised(row)),
            "gap_closed": _known(self.gap_closed(row)),
        }


def learning_data(learned: AdaMergingResult) -> dict[str, Any]:
    """The learned coefficients as JSON data, without their history, which is in history.safetensors."""
    coefficients = learned.coefficients
    return {
        "tasks": list(coefficients.tasks),
        "layers": list(coefficients.layers) if coefficients.layers else None,
        "coefficients": coefficients.values.tolist(),
        "steps": len(learned.losses),
        "losses": learned.losses.tolist(),
        "scores": {str(step): value for step, value in learned.scores.items()},
        "feature_norms": {task: norm._asdict() for task, norm in learned.feature_norms.items()},
        "warnings": list(learned.warnings),
    }


def repair_data(fitted: RepairResult) -> dict[str, Any]:
    """A repair's cost and effect as JSON data; losses are those of each task's first and last step."""
    columns = zip(fitted.tasks, fitted.losses.T.tolist(), strict=True)
    losses = {task: [value for value in column if math.isfinite(value)] for task, column in columns}
    data: dict[str, Any] = {
        "kind": fitted.kind,
        "split": fitted.split,
        "added_parameters": fitted.added_parameters,
        "encoders_at_inference": fitted.encoders,
        "inputs_encoded": {"merged": fitted.passes.merged, "experts": fitted.passes.experts},
        "steps": len(fitted.losses),
        "first_loss": {task: column[0] for task, column in losses.items() if column},
        "last_loss": {task: column[-1] for task, column in losses.items() if column},
        "active_share": dict(fitted.active),
        "warnings": list(fitted.warnings),
        "scores": {str(step): value for step, value in fitted.scores.items()},
    }
    if fitted.representation is not None:
        data["representation"] = _distances(fitted.representation)
    return data


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _distances(compared: Representation) -> dict[str, Any]:
    """Mean L1 and linear CKA to the expert, before and after, by task and layer."""

    def table(values: Tensor) -> dict[str, dict[str, float]]:
        rows = zip(compared.tasks, values.tolist(), strict=True)
        return {task: dict(zip(compared.layers, row, strict=True)) for task, row in rows}

    sides = {"before": compared.before, "after": compared.after}
    return {side: {"l1": table(distances.l1), "cka": table(distances.cka)} for side, distances in sides.items()}


def percent(value: float | None) -> str:
    """A share as a percentage with one decimal, or a dash if it is undefined."""
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.1f}"


def common_metric(tasks: Sequence[str], metrics: Mapping[str, str]) -> str | None:
    """The metric of several tasks that all have the same, which is then named once; else None."""
    names = {metrics.get(task) for task in tasks}
    return next(iter(names)) if len(tasks) > 1 and len(names) == 1 else None


def unit_of(tasks: Sequence[str], metrics: Mapping[str, str]) -> str:
    """The scores of a table in words.

    >>> unit_of(["german", "code"], dict.fromkeys(["german", "code"], "bits_per_byte"))
    'bits per byte'
    """
    single = common_metric(tasks, metrics) if metrics else "accuracy"
    if single is None:
        return "shares in %"
    return single.replace("_", " ") + " in %" * metric(single).share


def task_heads(tasks: Sequence[str], metrics: Mapping[str, str]) -> list[str]:
    """The heads of the tasks' columns: with the metric where they differ, and ↓ where less is better.

    >>> task_heads(["german", "mnist"], {"german": "bits_per_byte"})
    ['german, bits per byte ↓', 'mnist']
    >>> task_heads(["german", "code"], dict.fromkeys(["german", "code"], "bits_per_byte"))
    ['german ↓', 'code ↓']
    """
    single = common_metric(tasks, metrics)
    names = {task: "" if single else f", {name.replace('_', ' ')}" for task, name in metrics.items()}
    return [f"{task}{names[task]}{' ↓' * metric(metrics[task]).lower}" if task in names else task for task in tasks]


def score_text(value: float | None, name: str | None, error: float | None = None) -> str:
    """A score as text: shares in percent with one decimal, others with three; with its standard error if known.

    >>> score_text(0.5, "acc", 0.01), score_text(2.5, "bits_per_byte"), score_text(None, None)
    ('50.0 ±1.0', '2.500', '–')
    """
    share = (ACCURACY if name is None else metric(name)).share
    if value is None or not math.isfinite(value):
        return "–"
    text = percent(value) if share else f"{value:.3f}"
    if error is None or not math.isfinite(error):
        return text
    return f"{text} ±{percent(error) if share else f'{error:.3f}'}"


def about_scores(tasks: Sequence[str], metrics: Mapping[str, str]) -> str:
    """The meaning of the table's numbers, in a sentence."""
    if not metrics:
        return "Accuracy in %. Norm.: mean over tasks of accuracy / expert accuracy."
    unit = unit_of(tasks, metrics)
    lower = sorted({name.replace("_", " ") for name in metrics.values() if metric(name).lower})
    less = f"Less is better for {', '.join(lower)} (↓). " if lower else ""
    return (
        f"{unit[0].upper()}{unit[1:]}, ± standard error. {less}Norm.: mean over tasks of score / expert score, "
        "the other way round where less is better. Gap closed: 0 is the pretrained model, 100 the experts, whatever "
        "the unit."
    )


def columns(report: Report) -> list[str]:
    """The column heads of the accuracy table."""
    metrics = report.metrics
    return ["", *task_heads(report.tasks, metrics), "mean", "norm.", "gap closed"]


def cells(report: Report, row: Row) -> list[str]:
    """One row of the accuracy table, shares in percent."""
    names = report.metrics
    scores = [score_text(row.accuracies.get(t), names.get(t), row.errors.get(t)) for t in report.tasks]
    mean = score_text(row.mean, next(iter(names.values()), None))
    return [row.name, *scores, mean, *map(percent, (report.normalised(row), report.gap_closed(row)))]


#: The column heads of a row's cost: what it needs to be made, and to be used.
COSTS = ("task's name", "learned", "added", "seconds", "memory")


def costs(data: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    """The cost of a row of report.json: the task's name, what was learned, parameters added, seconds, and memory."""
    seconds, memory = data["seconds"].get(row["name"]), data["memory"].get(row["name"])
    needed = "needed" if row.get("needs_task") else "routed" if row.get("routed") else "–"
    added = row.get("added_parameters")
    return [
        needed,
        row.get("learned") or "–",
        f"{added:,}" if added else "–",
        "–" if seconds is None else f"{seconds:.1f}",
        "–" if memory is None else in_bytes(memory),
    ]
