"""The inputs of a task, decoded, with its labels and its head."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor

from suture import tasks as data
from suture.core.batches import Inputs, take
from suture.core.head import Head
from suture.core.progress import Track, untracked
from suture.evaluation.input_cache import decoded
from suture.families import Family
from suture.tasks import Split, Task


@dataclass(frozen=True, eq=False)
class TaskInputs:
    """One task, decoded: inputs (N, …), or a mapping of several such tensors, labels (N,), and the head, if any.

    `identity` says which data these are, where they come from files.
    """

    name: str
    inputs: Inputs
    labels: Tensor
    head: Head | None = None
    classnames: tuple[str, ...] | None = None
    identity: str | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> "TaskInputs":
        """The same task with its first inputs only."""
        return replace(self, inputs=take(self.inputs, slice(0, count)), labels=self.labels[:count], identity=None)

    def logits(self, output: Tensor) -> Tensor:
        """Logits (B, C) from what the model gave: features (B, D), or logits where there is no head."""
        return output if self.head is None else self.head(output)


def evaluation_set(
    family: Family,
    pool: Iterable[Task],
    split: Split = "test",
    track: Track = untracked,
    first: int | None = None,
) -> dict[str, TaskInputs]:
    """All tasks of a pool, decoded once for every model that will be evaluated, with their heads."""
    return {task.name: task_inputs(family, task, split, track, first) for task in pool}


def task_inputs(
    family: Family, task: Task, split: Split = "test", track: Track = untracked, first: int | None = None
) -> TaskInputs:
    """One task, or only its `first` inputs, as the family reads them, with its head."""
    found = data.load(task, split)
    found = found if first is None else found.first(first)
    return TaskInputs(
        name=task.name,
        inputs=decoded(family, found, track, f"Decoding {task.name}"),
        labels=found.labels,
        head=family.head(task, track),
        classnames=task.classnames,
        identity=found.identity,
    )
