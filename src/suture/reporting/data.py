"""The contents of a report, as plain data; every way of showing it starts here."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from suture.evaluation import Row
from suture.pipeline.adamerging import Adapted
from suture.pipeline.repairs import Repaired
from suture.repairs import OnlineResult, Representation


@dataclass(frozen=True)
class Learning:
    """How a method learned its coefficients.

    `coefficients`: (task,) or (task, layer), as the result has them; `history`: (step + 1, task[, layer]), the
    unknowns; `losses`: (step,), the objective summed over tasks; `scores`: step → mean accuracy, where asked for.
    """

    tasks: tuple[str, ...]
    layers: tuple[str, ...] | None
    coefficients: Tensor
    history: Tensor
    losses: Tensor
    scores: Mapping[int, float] = field(default_factory=dict)

    @classmethod
    def of(cls, adapted: Adapted) -> "Learning":
        """What a report says of an adaptation."""
        result, scores = adapted.result, {step: row.mean for step, row in adapted.scores.items()}
        found = result.coefficients
        return cls(found.tasks, found.layers, found.values, result.history, result.losses, scores)

    def as_data(self) -> dict[str, Any]:
        """As JSON can hold it; the history is in a file of its own."""
        return {
            "tasks": list(self.tasks),
            "layers": list(self.layers) if self.layers else None,
            "coefficients": self.coefficients.tolist(),
            "steps": len(self.losses),
            "losses": self.losses.tolist(),
            "scores": {str(step): value for step, value in self.scores.items()},
        }


@dataclass(frozen=True)
class RepairReport:
    """What a repair cost and what it moved; `representation` has the distances to the experts before and after."""

    kind: str
    added_parameters: int
    encoded: Mapping[str, int]
    encoders: int = 1
    steps: int = 0
    losses: Mapping[str, Sequence[float]] = field(default_factory=dict)
    active: Mapping[str, float] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    scores: Mapping[int, float] = field(default_factory=dict)
    representation: Representation | None = None

    @classmethod
    def of(cls, repaired: Repaired) -> "RepairReport":
        """What a report says of a repair."""
        result, passes = repaired.result, repaired.result.passes
        encoded = {"merged": passes.merged, "experts": passes.experts}
        if isinstance(result, OnlineResult):
            added = result.models[max(result.models)].added_parameters
            losses = {task: values.tolist() for task, values in result.losses.items()}
            return cls(repaired.kind, added, encoded, steps=max(map(len, losses.values())), losses=losses)
        losses = {str(i): column.tolist() for i, column in enumerate(result.losses.T)}
        if repaired.representation is not None:
            losses = dict(zip(repaired.representation.tasks, losses.values(), strict=True))
        return cls(
            repaired.kind,
            result.added_parameters,
            encoded,
            result.encoders,
            len(result.losses),
            losses,
            result.active,
            result.warnings,
            repaired.scores,
            repaired.representation,
        )

    def as_data(self) -> dict[str, Any]:
        """As JSON can hold it; losses are those of the first and the last step that each task had."""
        known = {task: [value for value in losses if math.isfinite(value)] for task, losses in self.losses.items()}
        data: dict[str, Any] = {
            "kind": self.kind,
            "added_parameters": self.added_parameters,
            "encoders_at_inference": self.encoders,
            "inputs_encoded": dict(self.encoded),
            "steps": self.steps,
            "first_loss": {task: losses[0] for task, losses in known.items() if losses},
            "last_loss": {task: losses[-1] for task, losses in known.items() if losses},
            "active_share": dict(self.active),
            "warnings": list(self.warnings),
            "scores": {str(step): value for step, value in self.scores.items()},
        }
        if self.representation is not None:
            data["representation"] = _distances(self.representation)
        return data


@dataclass(frozen=True)
class Report:
    """Accuracies of several models on the same tasks, and what it takes to repeat the run.

    `curves`: knob → model → value of the knob → mean accuracy. `matrix`: a row for each expert, on every task.

    `pretrained` and `experts` are among the `rows`; without them nothing can be said of the gap. Times are seconds.
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
    learning: Mapping[str, Learning] = field(default_factory=dict)
    repairs: Mapping[str, RepairReport] = field(default_factory=dict)
    matrix: Sequence[Row] = ()

    @property
    def tasks(self) -> list[str]:
        """The tasks in the order of the pool."""
        return list(dict.fromkeys(task for row in self.rows for task in row.accuracies))

    @property
    def samples(self) -> dict[str, int]:
        """How many test inputs each task was scored on."""
        return {task: count for row in self.rows for task, count in row.samples.items()}

    def normalised(self, row: Row) -> float:
        """Mean over tasks of accuracy / expert accuracy; nan without experts."""
        return row.normalised_mean(self.experts) if self.experts else math.nan

    def gap_closed(self, row: Row) -> float:
        """(row − pretrained) / (experts − pretrained) of the means; nan without either."""
        if self.pretrained is None or self.experts is None:
            return math.nan
        return row.gap_closed(self.pretrained, self.experts)

    def as_data(self) -> dict[str, Any]:
        """Everything as JSON can hold it; what is not known is null."""
        return {
            "title": self.title,
            "command": self.command,
            "tasks": self.tasks,
            "samples": self.samples,
            "rows": [self._row_as_data(row) for row in self.rows],
            "curves": {
                knob: {n: list(map(list, c.items())) for n, c in cs.items()} for knob, cs in self.curves.items()
            },
            "matrix": {row.name: dict(row.accuracies) for row in self.matrix},
            "learning": {name: learned.as_data() for name, learned in self.learning.items()},
            "repairs": {name: repair.as_data() for name, repair in self.repairs.items()},
            "profile_seconds": dict(self.profile),
            "notes": list(self.notes),
            "config": dict(self.config),
            "provenance": dict(self.provenance),
        }

    def _row_as_data(self, row: Row) -> dict[str, Any]:
        known = lambda value: value if math.isfinite(value) else None
        return {
            "name": row.name,
            "accuracies": dict(row.accuracies),
            "mean": known(row.mean),
            "normalised_mean": known(self.normalised(row)),
            "gap_closed": known(self.gap_closed(row)),
        }


def _distances(found: Representation) -> dict[str, Any]:
    """Mean L1 and linear CKA to the expert, before and after, by task and place."""
    table = lambda values: {
        t: dict(zip(found.places, row, strict=True)) for t, row in zip(found.tasks, values.tolist(), strict=True)
    }
    sides = {"before": found.before, "after": found.after}
    return {side: {"l1": table(distances.l1), "cka": table(distances.cka)} for side, distances in sides.items()}


def percent(value: float | None) -> str:
    """One decimal, or a dash where there is nothing to say."""
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.1f}"


def columns(report: Report) -> list[str]:
    """The heads of the accuracy table."""
    return ["", *report.tasks, "mean", "norm.", "gap closed"]


def cells(report: Report, row: Row) -> list[str]:
    """One row of the accuracy table, in percent."""
    accuracies = [percent(row.accuracies.get(task)) for task in report.tasks]
    return [row.name, *accuracies, *map(percent, (row.mean, report.normalised(row), report.gap_closed(row)))]
