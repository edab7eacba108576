"""SyMerge: learn the coefficients and each task's head from what the experts predict. https://arxiv.org/abs/2412.19098"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, normalize

from suture.adaptation.adamerging import endless
from suture.adaptation.coefficients import Coefficients, Layout, initial_values, layout
from suture.adaptation.merged_model import MergedModel, matched_tensors
from suture.adaptation.options import AdaMergingOptions
from suture.adaptation.trajectory import Trajectory
from suture.adaptation.vectors import task_vector_rows
from suture.checkpoints import Source
from suture.core.batches import Forward, call, to_device
from suture.core.head import Head
from suture.core.random import generator_for
from suture.errors import ConfigError
from suture.merging.task_vectors import open_task_vectors
from suture.storage.resume import Resume
from suture.tasks.given import Given, batches_of


@dataclass(frozen=True)
class SyMergeResult:
    """The learned coefficients and heads, and the merged model.

    - `coefficients`: one for each task and tensor, within [0, 1].
    - `heads`: task → its head, which normalises the feature.
    - `history`: (round + 1, task, tensor) the optimizer's values before each round and after the last.
    - `losses`: (step,) the cross-entropy of each step in nats; nan where no input was learned from.
    - `merged`: the merged checkpoint, in the base's names and dtypes, on the CPU.
    """

    coefficients: Coefficients
    heads: dict[str, Head]
    history: Float[Tensor, "round task tensor"]
    losses: Float[Tensor, " step"]
    merged: dict[str, Tensor]


def symerge(
    module: nn.Module,
    base: Source,
    models: Mapping[str, Source] | Sequence[Source],
    batches: Mapping[str, Given],
    heads: Mapping[str, Float[Tensor, "class dim"]],
    *,
    rounds: int = 500,
    lr: float = 1e-2,
    init_values: float = 0.3,
    order: Iterable[Sequence[str]] | None = None,
    forward: Forward = call,
    frozen: Sequence[str] = (),
    batch_size: int = 32,
    seed: int = 0,
    resume: Resume | None = None,
) -> SyMergeResult:
    """Learn λ of θ = θ₀ + Σ λ_t τ_t, within [0, 1], and a head for each task, on unlabelled inputs.

    In a round every task has one step, in a shuffled order or in that of `order`. The target of an input is the class
    that its expert predicts with the head that was given; inputs are left out where the merged model predicts another
    class and is surer of it. `forward(module, inputs)` returns features (batch, dim), which are normalised. `heads` are
    the rows of zero-shot heads times their logit scale: the published `lr` belongs to rows of length about 100, and
    destroys a head of unit rows. `batches` is as for `adapt`. The heads' biases start at 0.

    Raises `ConfigError` for a task without a head or inputs, and `IncompatibleModels` for weights that do not fit.
    """
    vectors = open_task_vectors(base, models, frozen=frozen)
    columns = layout("layer", tuple(vectors.models), matched_tensors(module, vectors)[0])
    for kind, given in (("heads", heads), ("batches", batches)):
        if missing := [task for task in columns.tasks if task not in given]:
            raise ConfigError(f"{kind} lacks {missing[0]!r}; wanted one entry a model: {', '.join(columns.tasks)}.")
    model = MergedModel(module, vectors, task_vector_rows(vectors, AdaMergingOptions()))
    values = initial_values(init_values, columns).requires_grad_()
    learned = {task: _Head(heads[task]) for task in columns.tasks}
    parts = [tensor for head in learned.values() for tensor in (head.weight, head.bias)]
    trajectory = Trajectory(values, torch.optim.Adam([values, *parts], lr=lr), resume, parts)
    tasks = len(columns.tasks)
    streams = {
        task: endless(task, batches_of(batches[task], task, batch_size, seed), trajectory.step // tasks)
        for task in columns.tasks
    }
    orders = list(order) if order is not None else [_shuffled(columns.tasks, seed, i) for i in range(rounds)]
    with torch.enable_grad(), model.collecting():
        for step in range(trajectory.step, len(orders) * tasks):
            task = orders[step // tasks][step % tasks]
            inputs = to_device(next(streams[task]), model.device)
            loss = _step(model, learned[task], trajectory, columns, inputs, task, forward)
            trajectory.advance(loss, last=step + 1 == len(orders) * tasks)
    return _result(model, values.detach().clamp(0, 1), learned, columns, trajectory)


class _Head:
    """A head that is learned, and the one that the expert keeps."""

    def __init__(self, given: Tensor):
        self.given = given.detach()
        self.weight = self.given.clone().requires_grad_()
        self.bias = self.given.new_zeros(len(given)).requires_grad_()

    def logits(self, features: Tensor) -> Tensor:
        return linear(normalize(features, dim=-1), self.weight.to(features), self.bias.to(features))

    def of_expert(self, features: Tensor) -> Tensor:
        return linear(normalize(features, dim=-1), self.given.to(features))


def _step(
    model: MergedModel,
    head: _Head,
    trajectory: Trajectory,
    columns: Layout,
    inputs: object,
    task: str,
    forward: Forward,
) -> float:
    """One step on one task's batch; returns the loss, nan where no input is left, and nothing changes."""
    with torch.no_grad():
        model.write_expert(task)
        sure, classes = head.of_expert(forward(model.module, inputs)).softmax(-1).max(-1)
    coefficients = columns.spread(trajectory.values, clamp=True, softmax=False)
    model.write(coefficients.detach())
    logits = head.logits(forward(model.module, inputs))
    own, predicted = logits.detach().softmax(-1).max(-1)
    learned_from = (predicted == classes) | (sure >= own)
    if not learned_from.any():
        return float("nan")
    loss = cross_entropy(logits[learned_from], classes[learned_from])
    trajectory.optimizer.zero_grad()  # other heads have no gradient, so that Adam leaves them alone
    model.backward(loss, head.weight, head.bias)
    coefficients.backward(model.gradient().to(coefficients))
    trajectory.optimizer.step()
    return loss.item()


def _shuffled(tasks: tuple[str, ...], seed: int, step: int) -> list[str]:
    positions = torch.randperm(len(tasks), generator=generator_for(seed, f"symerge/{step}"))
    return [tasks[i] for i in positions.tolist()]


def _result(
    model: MergedModel, final: Tensor, learned: Mapping[str, _Head], columns: Layout, trajectory: Trajectory
) -> SyMergeResult:
    heads = {t: Head(h.weight.detach(), h.bias.detach(), normalised=True) for t, h in learned.items()}
    history = torch.stack(trajectory.history[:: len(columns.tasks)])
    losses = torch.tensor(trajectory.losses, dtype=torch.float64)
    merged = model.merged(columns.spread(final, clamp=False, softmax=False))
    return SyMergeResult(Coefficients(final, columns.tasks, columns.columns), heads, history, losses, merged)
