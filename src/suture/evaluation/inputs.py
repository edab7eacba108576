"""The inputs of tasks, decoded, with their labels and heads."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from suture import tasks as data
from suture.core.batches import Inputs, take
from suture.core.head import Head
from suture.core.progress import Profile, Track, untracked
from suture.evaluation.input_cache import decoded
from suture.families import Family
from suture.families.shared.requests import Requests
from suture.tasks import Split, Task
from suture.tasks.base import SPLITS
from suture.tasks.given import Given, labelled


@dataclass(frozen=True, eq=False)
class TaskInputs:
    """One decoded task: inputs (N, …) or a mapping of such tensors, labels (N,), and the head, if any.

    `identity` identifies the data if they come from files. `requests`: what a language model is asked to be scored; its
    inputs are prompts without labels. `model` names the task's expert where that has another name.
    """

    name: str
    inputs: Inputs
    labels: Tensor
    head: Head | None = None
    classnames: tuple[str, ...] | None = None
    identity: str | None = None
    requests: Requests | None = None
    model: str | None = None

    @property
    def expert(self) -> str:
        """The name of the model that is this task's expert."""
        return self.model or self.name

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> "TaskInputs":
        """The same task with only its first `count` inputs."""
        return self.at(slice(0, count))

    def at(self, positions: Tensor | slice) -> "TaskInputs":
        """The same task with the inputs at some positions."""
        return replace(self, inputs=take(self.inputs, positions), labels=self.labels[positions], identity=None)

    def inputs_at(self, positions: Tensor) -> Inputs:
        """The inputs at some positions, without a copy if these are all positions in order."""
        everything = len(positions) == len(self) and torch.equal(positions, torch.arange(len(self)))
        return self.inputs if everything else take(self.inputs, positions)

    def logits(self, output: Tensor) -> Tensor:
        """Logits (B, C) from a model's output: features (B, D), or logits already if the task has no head."""
        return output if self.head is None else self.head(output)


def as_task(given: Given, name: str) -> TaskInputs:
    """A task without a head, from inputs and labels in any of their forms; a `TaskInputs` as it is."""
    return given if isinstance(given, TaskInputs) else TaskInputs(name, *labelled(given, name))


class SplitInputs(Mapping[Split, Mapping[str, TaskInputs]]):
    """Split → task → inputs. A split is decoded at its first access, with the heads of all tasks.

    With `first`, only so many inputs of each task are decoded. The time counts as "data loading" in the `profile`.
    """

    def __init__(
        self,
        family: Family,
        tasks: Sequence[Task],
        *,
        first: int | None = None,
        track: Track = untracked,
        profile: Profile | None = None,
    ):
        self._family, self._tasks = family, tasks
        self._first = first
        self._track, self._profile = track, profile or Profile()
        self._decoded: dict[Split, dict[str, TaskInputs]] = {}

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks."""
        return tuple(task.name for task in self._tasks)

    def __getitem__(self, split: Split) -> dict[str, TaskInputs]:
        if split not in self._decoded:
            with self._profile("data loading"):
                self._decoded[split] = evaluation_set(self._family, self._tasks, split, self._track, self._first)
        return self._decoded[split]

    def __iter__(self) -> Iterator[Split]:
        return iter(SPLITS)

    def __len__(self) -> int:
        return len(SPLITS)


def evaluation_set(
    family: Family,
    pool: Iterable[Task],
    split: Split = "test",
    track: Track = untracked,
    first: int | None = None,
) -> dict[str, TaskInputs]:
    """All tasks of a pool with their heads, decoded once for every model to evaluate."""
    return {task.name: task_inputs(family, task, split, track, first) for task in pool}


def task_inputs(
    family: Family, task: Task, split: Split = "test", track: Track = untracked, first: int | None = None
) -> TaskInputs:
    """One task, or only its `first` inputs, decoded by the family, with its head."""
    if task.score is not None:
        return _language_inputs(family, task, split, track, first)
    loaded = data.load(task, split)
    loaded = loaded if first is None else loaded.first(first)
    return TaskInputs(
        name=task.name,
        inputs=decoded(family, loaded, track, f"Decoding {task.name}"),
        labels=loaded.labels,
        head=family.head(task, track),
        classnames=task.classnames,
        identity=loaded.identity if family.preprocessing else None,  # code of one's own may change
        model=task.model,
    )


def _language_inputs(family: Any, task: Task, split: Split, track: Track, first: int | None) -> TaskInputs:
    """A task with a `score`: unlabelled prompts, and the requests of its rows."""
    rows = data.passages(task, split)
    rows = rows if first is None else rows.first(first)
    with track(f"Reading {task.name}", len(rows)) as advance:
        inputs, requests = family.language_inputs(task, rows)
        advance(len(rows))
    labels = torch.zeros(len(rows), dtype=torch.int64)
    facts: dict[str, Any] = {"identity": rows.identity, "requests": requests, "model": task.model}
    return TaskInputs(task.name, inputs, labels, family.head(task), **facts)
