"""Accuracy of models on tasks, and the three summaries of it: mean, mean relative to the experts, gap closed.

`evaluate(model, task)` is the whole job for one model and one task. The model is any callable: it gives
features (B, D) where the task has a head, and logits (B, C) where it has none. Inputs that are a mapping of tensors, as
token ids with their mask, are its keyword arguments. What is undefined is nan.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from suture.core.batches import Forward, call, device_of, evaluation_mode, take, to_device
from suture.core.progress import Track, untracked
from suture.errors import CheckpointError, ConfigError, DataError
from suture.evaluation.inputs import TaskInputs
from suture.evaluation.rows import Row

Model = Callable[..., Tensor]
BATCH_SIZE = 256


class Accuracy(NamedTuple):
    """A share of correct answers and how many inputs it was measured on."""

    value: float
    samples: int


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
