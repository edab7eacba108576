"""A row of the accuracy table, and its summaries: mean, mean relative to the experts, gap closed.

Undefined values are nan.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite, nan
from statistics import fmean
from typing import TYPE_CHECKING, Literal

from suture.core.notebooks import frame, table_html
from suture.evaluation.intervals import Interval, mean_interval, wilson

if TYPE_CHECKING:
    from pandas import DataFrame

from suture.evaluation.metrics import ACCURACY, Metric, metric

Role = Literal["pretrained", "experts", "merge", "repair"]


@dataclass(frozen=True)
class Row:
    """One model's row of the table: accuracy, in [0, 1], and sample count for each task.

    `role` says what was scored: the pretrained model, the experts each on its own task, a merge, or a repair. A
    repair's row also has the label of its `merge` and its kind, `repair`. In a `routed` row a router chose each input's
    task. `needs_task`: whether the task's name must be given at inference. `learned` says what was learned and from
    which inputs, and is empty where only weights were read; `split` is the split of these inputs, if any. `seconds` is
    the time that making the model took, `memory` the process's peak meanwhile in bytes, if it is known, and
    `added_parameters` the number of the model's parameters beside one model's.
    `routing`: task → the share of its inputs that the router sends to it. `warnings` are lines about this row.

    `metrics`: task → the name of its score, where that is no accuracy; `errors`: task → its standard error; `details`:
    task → metric → (value, standard error), of everything that was measured. The mean of tasks with scores in different
    units is nan; the gap closed is then the mean of the gaps closed over the tasks that have one.
    """

    name: str
    accuracies: Mapping[str, float]
    samples: Mapping[str, int] = field(default_factory=dict)
    role: Role = "merge"
    merge: str | None = None
    repair: str | None = None
    routed: bool = False
    needs_task: bool = False
    learned: str = ""
    seconds: float | None = field(default=None, compare=False)
    memory: int | None = field(default=None, compare=False)
    split: str = ""
    added_parameters: int = 0
    routing: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    metrics: Mapping[str, str] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Mapping[str, tuple[float, float]]] = field(default_factory=dict)

    def metric(self, task: str) -> Metric:
        """The metric of a task."""
        return metric(self.metrics[task]) if task in self.metrics else ACCURACY

    @property
    def comparable(self) -> bool:
        """Whether the scores of all tasks have one unit, so that they have a mean."""
        metrics = {self.metric(task) for task in self.accuracies}
        return len(metrics) <= 1 or all(each.share and not each.lower for each in metrics)

    def __repr__(self) -> str:
        shares = all(self.metric(task).share for task in self.accuracies)
        mean = f"{100 * self.mean:.1f} %" if shares else f"{self.mean:.4g}"
        known = self.accuracies and self.mean == self.mean  # nan for scores in several units
        return f"Row({self.name!r}, {len(self.accuracies)} tasks{f', mean {mean}' if known else ''})"

    def to_pandas(self) -> "DataFrame":
        """Accuracy and number of inputs, by task."""
        rows = [(task, value, self.samples.get(task)) for task, value in self.accuracies.items()]
        return frame(("task", "accuracy", "samples"), rows, index="task")

    def _repr_html_(self) -> str:
        rows = [(task, *self._shown(task), self.samples.get(task, "")) for task in self.accuracies]
        return table_html(("task", "score", "", "samples"), rows, self.name)

    def _shown(self, task: str) -> tuple[str, str]:
        """The score on a task, and its unit."""
        value, metric = self.accuracies[task], self.metric(task)
        if metric.share:
            return f"{100 * value:.1f}", f"{metric.name} in %"
        return f"{value:.4g}", metric.name

    @property
    def mean(self) -> float:
        """The unweighted mean over tasks; nan where their scores are in different units."""
        return fmean(self.accuracies.values()) if self.comparable else nan

    def normalised(self, experts: "Row") -> dict[str, float]:
        """Per task, accuracy / the expert's accuracy; nan where there is no expert or its accuracy is 0.

        Where less is better it is the expert's score / the model's, so that more is better here too.
        """
        pairs = {task: (value, experts.on(task)) for task, value in self.accuracies.items()}
        return {task: _ratio(*pair[:: -1 if self.metric(task).lower else 1]) for task, pair in pairs.items()}

    def normalised_mean(self, experts: "Row") -> float:
        """The mean over tasks of accuracy / the expert's accuracy; nan if it is nan on any task."""
        return fmean(self.normalised(experts).values())

    def gaps_closed(self, pretrained: "Row", experts: "Row") -> dict[str, float]:
        """Per task, (model − pretrained) / (expert − pretrained); nan where there is no gap to close."""
        return {
            task: _ratio(value - pretrained.on(task), experts.on(task) - pretrained.on(task))
            for task, value in self.accuracies.items()
        }

    def gap_closed(self, pretrained: "Row", experts: "Row") -> float:
        """(model − pretrained) / (expert − pretrained) of the means over tasks; nan where there is no gap."""
        if not self.comparable:
            closed = [value for value in self.gaps_closed(pretrained, experts).values() if isfinite(value)]
            return fmean(closed) if closed else nan
        start, goal = (fmean(row.on(task) for task in self.accuracies) for row in (pretrained, experts))
        return _ratio(self.mean - start, goal - start)

    def interval(self, task: str) -> Interval | None:
        """The 95% interval of the accuracy on one task (Wilson); None where the score is no accuracy."""
        return None if task in self.metrics else wilson(self.accuracies[task], self.samples.get(task, 0))

    @property
    def mean_interval(self) -> Interval | None:
        """The 95% interval of the mean accuracy; None for other scores, and without the numbers of inputs."""
        return None if self.metrics else mean_interval(self.accuracies, self.samples)

    def on(self, task: str) -> float:
        """The accuracy on one task; nan if this row was not measured on it."""
        return self.accuracies.get(task, nan)


def _ratio(part: float, whole: float) -> float:
    return part / whole + 0.0 if whole else nan  # + 0.0: a zero has no sign
