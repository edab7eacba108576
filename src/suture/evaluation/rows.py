"""A row of the accuracy table, and its summaries: mean, mean relative to the experts, gap closed.

Undefined values are nan.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import nan
from statistics import fmean
from typing import TYPE_CHECKING, Literal

from suture.core.notebooks import frame, table_html
from suture.evaluation.intervals import Interval, mean_interval, wilson

if TYPE_CHECKING:
    from pandas import DataFrame

Role = Literal["pretrained", "experts", "merge", "repair"]


@dataclass(frozen=True)
class Row:
    """One model's row of the table: accuracy, in [0, 1], and sample count for each task.

    `role` says what was scored: the pretrained model, the experts each on its own task, a merge, or a repair. A
    repair's row also has the label of its `merge` and its kind, `repair`. In a `routed` row a router chose each input's
    task. `needs_task`: whether the task's name must be given at inference. `learned` says what was learned and from
    which inputs, and is empty where only weights were read; `split` is the split of these inputs, if any. `seconds` is
    the time that making the model took, and `added_parameters` the number of its parameters beside one model's.
    `routing`: task → the share of its inputs that the router sends to it. `warnings` are lines about this row.
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
    split: str = ""
    added_parameters: int = 0
    routing: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        mean = f", mean {100 * self.mean:.1f} %" if self.accuracies else ""
        return f"Row({self.name!r}, {len(self.accuracies)} tasks{mean})"

    def to_pandas(self) -> "DataFrame":
        """Accuracy and number of inputs, by task."""
        rows = [(task, value, self.samples.get(task)) for task, value in self.accuracies.items()]
        return frame(("task", "accuracy", "samples"), rows, index="task")

    def _repr_html_(self) -> str:
        rows = [(task, f"{100 * value:.1f}", self.samples.get(task, "")) for task, value in self.accuracies.items()]
        return table_html(("task", "accuracy (%)", "samples"), rows, self.name)

    @property
    def mean(self) -> float:
        """The unweighted mean over tasks."""
        return fmean(self.accuracies.values())

    def normalised(self, experts: "Row") -> dict[str, float]:
        """Per task, accuracy / the expert's accuracy; nan where there is no expert or its accuracy is 0."""
        return {task: _ratio(value, experts.on(task)) for task, value in self.accuracies.items()}

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
        start, goal = (fmean(row.on(task) for task in self.accuracies) for row in (pretrained, experts))
        return _ratio(self.mean - start, goal - start)

    def interval(self, task: str) -> Interval:
        """The 95% interval of the accuracy on one task (Wilson)."""
        return wilson(self.accuracies[task], self.samples.get(task, 0))

    @property
    def mean_interval(self) -> Interval | None:
        """The 95% interval of the mean over tasks; None if the number of inputs of a task is not known."""
        return mean_interval(self.accuracies, self.samples)

    def on(self, task: str) -> float:
        """The accuracy on one task; nan if this row was not measured on it."""
        return self.accuracies.get(task, nan)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else nan
