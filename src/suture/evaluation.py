"""Accuracy of models on tasks, and the three summaries of it: mean, mean relative to the experts, gap closed.

`evaluate(model, task)` is the whole job for one model and one task. The model is any callable: it gives
features (B, D) where the task has a head, and logits (B, C) where it has none. Inputs that are a mapping of tensors, as
token ids with their mask, are its keyword arguments. What is undefined is nan.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import nan
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from suture import tasks as data
from suture.batches import Forward, Inputs, call, device_of, take, to_device
from suture.decoded import decoded
from suture.errors import CheckpointError, ConfigError, DataError
from suture.families.base import Family, Track, untracked
from suture.heads import Head
from suture.tasks import Split, Task

Model = Callable[..., Tensor]
BATCH_SIZE = 256


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


class Accuracy(NamedTuple):
    """A share of correct answers and how many inputs it was measured on."""

    value: float
    samples: int


@dataclass(frozen=True)
class Row:
    """One model's line of the table: accuracy, between 0 and 1, and sample count for each task."""

    name: str
    accuracies: Mapping[str, float]
    samples: Mapping[str, int] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """The average over tasks, each task counting the same."""
        return fmean(self.accuracies.values())

    def normalised(self, experts: "Row") -> dict[str, float]:
        """Per task, accuracy / the expert's accuracy; nan where there is no expert or it has none right."""
        return {task: _ratio(value, experts.on(task)) for task, value in self.accuracies.items()}

    def normalised_mean(self, experts: "Row") -> float:
        """The mean over tasks of accuracy / the expert's accuracy; nan when it is nan on any task."""
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

    def on(self, task: str) -> float:
        """The accuracy on one task; nan when this row was not measured on it."""
        return self.accuracies.get(task, nan)


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


def evaluate(
    model: Model,
    task: TaskInputs,
    *,
    batch_size: int = BATCH_SIZE,
    track: Track = untracked,
    name: str = "Evaluating",
    forward: Forward = call,
) -> Accuracy:
    """The share of inputs whose largest logit is at the label.

    A module is in evaluation mode meanwhile, and batches go to its device, through `forward(model, inputs)`. Raises
    `DataError` for an empty task or labels outside of the logits, `CheckpointError` when the output is not finite.

    >>> task = TaskInputs("parity", torch.eye(2), torch.tensor([0, 0]))
    >>> evaluate(lambda inputs: inputs, task)
    Accuracy(value=0.5, samples=2)
    """
    correct = correct_answers(model, task, batch_size=batch_size, track=track, name=name, forward=forward)
    return Accuracy(int(correct.sum()) / len(task), len(task))


def correct_answers(
    model: Model,
    task: TaskInputs,
    *,
    batch_size: int = BATCH_SIZE,
    track: Track = untracked,
    name: str = "Evaluating",
    forward: Forward = call,
) -> Tensor:
    """Which inputs have their largest logit at the label: bool (N,), on the CPU. See `evaluate`."""
    if len(task) == 0:
        raise DataError(f"Task {task.name!r} has no inputs to evaluate on.")
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} is not a size; give 1 or more.")
    device = device_of(model) if isinstance(model, nn.Module) else torch.device("cpu")
    correct = []
    with torch.inference_mode(), evaluation_mode(model), track(f"{name}: {task.name}", len(task)) as advance:
        for start in range(0, len(task), batch_size):
            inputs = to_device(take(task.inputs, slice(start, start + batch_size)), device)
            labels = task.labels[start : start + batch_size]
            correct.append(_correct(task, task.logits(forward(model, inputs)), labels))
            advance(len(labels))
    return torch.cat(correct)


def evaluate_row(
    name: str,
    model: Model | Mapping[str, Model],
    tasks: Mapping[str, TaskInputs],
    *,
    batch_size: int = BATCH_SIZE,
    track: Track = untracked,
    forward: Forward = call,
) -> Row:
    """One model on all tasks; where `model` is a mapping from task to model, each task with its own."""
    chosen = (lambda task: model[task]) if isinstance(model, Mapping) else (lambda task: model)
    return _evaluate_each(name, chosen, tasks, name, batch_size=batch_size, track=track, forward=forward)


def evaluate_experts(
    expert: Callable[[str], Model],
    tasks: Mapping[str, TaskInputs],
    *,
    batch_size: int = BATCH_SIZE,
    track: Track = untracked,
    forward: Forward = call,
) -> Row:
    """Each expert on its own task. `expert(task)` gives the model; it may reload one shared module."""
    return _evaluate_each("experts", expert, tasks, "expert", batch_size=batch_size, track=track, forward=forward)


def expert_matrix(
    expert: Callable[[str], Model],
    tasks: Mapping[str, TaskInputs],
    names: Iterable[str] | None = None,
    *,
    batch_size: int = BATCH_SIZE,
    track: Track = untracked,
    forward: Forward = call,
) -> list[Row]:
    """Every expert on every task: one row for each of `names`, by default those of the tasks."""
    chosen = tasks if names is None else names
    how: dict[str, Any] = {"batch_size": batch_size, "track": track, "forward": forward}
    return [evaluate_row(name, expert(name), tasks, **how) for name in chosen]


def _correct(task: TaskInputs, logits: Tensor, labels: Tensor) -> Tensor:
    if not torch.isfinite(logits).all():
        raise CheckpointError(f"The model's output on task {task.name!r} is not finite; check its weights.")
    if int(labels.max()) >= logits.shape[-1]:
        raise DataError(
            f"Task {task.name!r} has labels up to {int(labels.max())} but the model only knows "
            f"{logits.shape[-1]} classes."
        )
    return logits.argmax(-1).cpu() == labels


def _evaluate_each(
    name: str, model: Callable[[str], Model], tasks: Mapping[str, TaskInputs], label: str, **how: Any
) -> Row:
    results = {task: evaluate(model(task), inputs, name=label, **how) for task, inputs in tasks.items()}
    return Row(name, {t: r.value for t, r in results.items()}, {t: r.samples for t, r in results.items()})


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else nan


@contextmanager
def evaluation_mode(model: Model) -> Iterator[None]:
    """Dropout off and statistics fixed inside the block; afterwards each submodule is as it was."""
    modes = [(m, m.training) for m in model.modules()] if isinstance(model, nn.Module) else []
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training
