"""Accuracy of models on tasks.

`evaluate(model, task)` scores one model on one task. The model is any callable that returns features (B, D) if the
task has a head, and logits (B, C) if it has none. Inputs that are a mapping of tensors, such as token ids and their
mask, are passed as keyword arguments.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn

from suture.core.batch_sizes import check_batch_size, fitting, fixed_size
from suture.core.batches import Forward, ahead, call, device_of, evaluation_mode, take, to_device
from suture.core.fabric import Team
from suture.core.progress import Track, untracked
from suture.core.replicas import on_replicas
from suture.core.sharding import Placed
from suture.errors import CheckpointError, ConfigError, DataError
from suture.evaluation.inputs import TaskInputs, as_task
from suture.evaluation.language import LanguageScore, LanguageScorer
from suture.evaluation.rows import Row
from suture.tasks.given import Given

Model = Callable[..., Tensor]
BATCH_SIZE = 256


class Accuracy(NamedTuple):
    """The share of correct predictions, in [0, 1], and the number of inputs."""

    value: float
    samples: int


@dataclass(frozen=True)
class Scorer:
    """Scores models in batches of `batch_size` inputs, through `forward(model, inputs)`.

    A module is put in evaluation mode for this, and batches are moved to its device; with several `devices`, copies of
    it share the batches. So do the processes of a `fabric`, all of which make the same calls and have the results; with
    the strategy fsdp each has a part of the module's weights, which may lie in mapped files. With `batch_size` "auto"
    there are as many inputs as fit in the memory of a GPU, and 256 elsewhere.
    """

    batch_size: Any = BATCH_SIZE
    track: Track = untracked
    forward: Forward = call
    devices: Sequence[torch.device] = ()
    fabric: Any = None

    @cached_property
    def team(self) -> Team:
        """The processes that share the work: this one alone without a fabric."""
        return Team(self.fabric)

    def correct(self, model: Model | Placed, task: TaskInputs, name: str = "Evaluating") -> Tensor:
        """Whether each input's largest logit is at its label: bool (N,), on the CPU. Raises as `evaluate` does."""
        return self.each_batch(model, task, lambda logits, labels: logits.argmax(-1).cpu() == labels, name)

    def each_batch(
        self,
        model: Model | Placed,
        task: TaskInputs,
        function: Callable[[Tensor, Tensor], Tensor],
        name: str = "Evaluating",
    ) -> Tensor:
        """`function(logits, labels)` of every batch, concatenated; raises as `evaluate` does."""
        if task.requests is not None:
            raise ConfigError(f"Task {task.name!r} is scored by {task.requests.scoring.metric}, not by its labels.")
        if len(task) == 0:
            raise DataError(f"Task {task.name!r} has no inputs to evaluate on.")
        check_batch_size("batch_size", self.batch_size)
        if not isinstance(self.batch_size, int):
            return self._fitting(model, task).each_batch(model, task, function, name)
        results, placed = [], self.team.placed(model)
        described, starts = f"{name}: {task.name}", range(0, len(task), self.batch_size)
        with self.team.scoring(), evaluation_mode(placed.module), self.track(described, len(task)) as advance:
            for start, output in zip(starts, self._outputs(placed, task, starts), strict=True):
                labels = task.labels[start : start + self.batch_size]
                logits = task.logits(output)
                _check(task, logits, labels)
                results.append(function(logits, labels))
                advance(len(labels))
        return torch.cat(results)

    def _fitting(self, model: Model | Placed, task: TaskInputs) -> "Scorer":
        """The scorer with a batch size for this model and task that fits."""
        module = model.module if isinstance(model, Placed) else model
        if self.team.world > 1 or not isinstance(module, nn.Module):  # all processes must have the same batches
            return replace(self, batch_size=fixed_size(self.batch_size))
        with torch.inference_mode(), evaluation_mode(module):
            found, forward = fitting(self.batch_size, "scored", self.forward, module, task.inputs, device_of(module))
        return replace(self, batch_size=found, forward=forward)

    def _outputs(self, placed: Placed, task: TaskInputs, starts: Iterable[int]) -> Iterator[Tensor]:
        """The model's output for each batch, on its device. Several processes, or else `devices`, share the batches."""
        model = placed.module
        device = device_of(model) if isinstance(model, nn.Module) else torch.device("cpu")

        batches = (take(task.inputs, slice(start, start + self.batch_size)) for start in starts)

        def output(module: nn.Module, batch: Any) -> Tensor:
            with torch.inference_mode():  # which each thread has to enter
                return self.forward(module, to_device(batch, device_of(module)))

        def own(start: int) -> Tensor:
            batch = take(task.inputs, slice(start, start + self.batch_size))
            return placed.run(lambda: self.forward(model, to_device(batch, device))).cpu()

        if self.team.world > 1:
            yield from (rows.to(device) for rows in self.team.each(own, starts, together=self.team.sharded))
        elif len(self.devices) > 1 and isinstance(model, nn.Module):
            yield from (rows.to(device) for rows in on_replicas(model, self.devices, output, batches))
        else:
            yield from (self.forward(model, batch) for batch in ahead(batches, device))

    def accuracy(self, model: Model | Placed, task: TaskInputs, name: str = "Evaluating") -> Accuracy:
        """The accuracy of a model on one task."""
        return Accuracy(int(self.correct(model, task, name).sum()) / len(task), len(task))

    def language(self, model: Model | Placed, task: TaskInputs, name: str = "Evaluating") -> LanguageScore:
        """The scores of a language model on a task with requests."""
        assert task.requests is not None
        scorer = LanguageScorer(track=self.track, forward=self.forward, team=self.team)
        return scorer.score(model, task.requests, f"{name}: {task.name}")

    def row(self, row: Row | str, model: Model | Mapping[str, Model], tasks: Mapping[str, TaskInputs]) -> Row:
        """The row of one model on all tasks; of each task's own where `model` is a mapping from task to model.

        `row` is the name of the new row, or a row to fill in with accuracies.
        """
        row = row if isinstance(row, Row) else Row(row, {})
        if isinstance(model, Mapping):
            return self._each(row, model.__getitem__, tasks, row.name)
        placed = self.team.placed(model)
        return self._each(row, lambda task: placed, tasks, row.name)

    def experts(self, expert: Callable[[str], Model], tasks: Mapping[str, TaskInputs]) -> Row:
        """The row of the experts, each on its own task. `expert(task)` may reload one shared module."""
        return self._each(Row("experts", {}, role="experts", needs_task=True), expert, tasks, "expert")

    def matrix(
        self, expert: Callable[[str], Model], tasks: Mapping[str, TaskInputs], names: Iterable[str] | None = None
    ) -> list[Row]:
        """Every expert on every task: one row for each of `names`, by default those of the tasks."""
        return [self.row(name, expert(name), tasks) for name in (tasks if names is None else names)]

    def _each(
        self, row: Row, model: Callable[[str], Model | Placed], tasks: Mapping[str, TaskInputs], name: str
    ) -> Row:
        plain = {task: inputs for task, inputs in tasks.items() if inputs.requests is None}
        results = {task: self.accuracy(model(task), inputs, name) for task, inputs in plain.items()}
        asked = {task: inputs for task, inputs in tasks.items() if inputs.requests is not None}
        scores = {task: self.language(model(task), inputs, name) for task, inputs in asked.items()}
        accuracies = {task: result.value for task, result in results.items()}
        row = replace(row, accuracies=accuracies, samples={task: result.samples for task, result in results.items()})
        return with_language_scores(row, scores, asked)


@overload
def evaluate(model: Model, task: TaskInputs, *, name: str = ..., **scoring: Any) -> Accuracy: ...
@overload
def evaluate(
    model: Model | Mapping[str, Model], task: Mapping[str, Given], *, name: str = ..., **scoring: Any
) -> Row: ...
def evaluate(model: Any, task: Any, *, name: str = "model", **scoring: Any) -> Accuracy | Row:
    """The accuracy of a model on a task: the share of inputs whose largest logit is at the label.

    With a mapping of tasks, the `Row` called `name` of all of them; then `model` may be a mapping from task to model. A
    task is a `TaskInputs`, or if it has no head a pair (inputs, labels), a loader of such pairs, or a file.

    `scoring` are the fields of `Scorer`. Raises `DataError` for an empty task or for labels beyond the logits, and
    `CheckpointError` if the output is not finite.

    >>> task = TaskInputs("parity", torch.eye(2), torch.tensor([0, 0]))
    >>> evaluate(lambda inputs: inputs, task)
    Accuracy(value=0.5, samples=2)
    """
    if isinstance(task, Mapping):
        return evaluate_row(name, model, {each: as_task(given, each) for each, given in task.items()}, **scoring)
    return Scorer(**scoring).accuracy(model, as_task(task, "task"), name)


def evaluate_row(name: str, model: Model | Mapping[str, Model], tasks: Mapping[str, TaskInputs], **scoring: Any) -> Row:
    """The row of one model on all tasks, or of each task's own if `model` is a mapping; `scoring`: see `Scorer`."""
    return Scorer(**scoring).row(name, model, tasks)


def with_language_scores(row: Row, scores: Mapping[str, LanguageScore], tasks: Mapping[str, TaskInputs]) -> Row:
    """A row with the scores of language tasks, in the order of the tasks."""
    if not scores:
        return row
    names = {task: inputs.requests.scoring.metric for task, inputs in tasks.items() if inputs.requests is not None}
    chosen = {task: score.estimates[names[task]] for task, score in scores.items()}
    return replace(
        row,
        accuracies={**row.accuracies, **{task: estimate.value for task, estimate in chosen.items()}},
        samples={**row.samples, **{task: score.samples for task, score in scores.items()}},
        errors={**row.errors, **{task: estimate.error for task, estimate in chosen.items()}},
        metrics={**row.metrics, **{task: names[task] for task in scores}},
        details={**row.details, **{task: dict(score.estimates) for task, score in scores.items()}},
    )


def _check(task: TaskInputs, logits: Tensor, labels: Tensor) -> None:
    if not torch.isfinite(logits).all():
        raise CheckpointError(f"The model's output on task {task.name!r} is not finite. Remedy: check its weights.")
    if int(labels.max()) >= logits.shape[-1]:
        raise DataError(
            f"Task {task.name!r} has labels up to {int(labels.max())} but the model only knows "
            f"{logits.shape[-1]} classes."
        )
