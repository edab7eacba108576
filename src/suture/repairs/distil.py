"""Distillation: the merged network's own weights are trained until its features equal those of every expert.

The experts are frozen, so their features are constants: each input is encoded once by its task's expert, which takes no
part in the loop. All tasks are in one batch of each step, and the result is one network for all of them, with nothing
beside it. Features as targets: https://arxiv.org/abs/1412.6550.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Lt
from jaxtyping import Float
from torch import Tensor, nn

from suture.adaptation.network import check_concatenation
from suture.core.batch_sizes import fixed_size
from suture.core.batches import Inputs, evaluation_mode, joinable, size, take, to_device
from suture.core.batches import concatenate as concatenated
from suture.core.fabric import Team
from suture.core.random import generator_for
from suture.errors import ConfigError, DataError
from suture.merging.task_vectors import compute_dtype
from suture.repairs.mixtures import with_mixtures
from suture.repairs.network import Block, Network, by_layer, find_blocks, position_mean
from suture.repairs.problem import Order, Problem
from suture.repairs.registry import repair_kind
from suture.repairs.results import RepairResult
from suture.repairs.static_model import StaticModel
from suture.repairs.trained_weights import Parameters, fold, master_copy, trained_weights, with_weights_of
from suture.repairs.training import Training, one_cycle, train

Loss = Literal["l1", "mse"]
_OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}


@repair_kind(paper="https://arxiv.org/abs/1412.6550", static=True, whole=True)
def distil(
    problem: Problem,
    *,
    steps: Annotated[int, Ge(1)] = 400,
    lr: Annotated[float, Gt(0)] = 1e-3,
    batch_size: Annotated[int, Ge(1)] = 16,
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw",
    weight_decay: Annotated[float, Ge(0)] = 0.0,
    schedule: Literal["one_cycle", "constant"] = "one_cycle",
    loss: Loss = "l1",
    layers: Literal["final", "blocks"] = "final",
    parameters: Parameters = "all",
    rank: Annotated[int, Ge(1)] = 16,
    statistics: Literal["frozen", "updated"] = "frozen",
    held_out: Annotated[float, Ge(0), Lt(1)] = 0.0,
    mixed: Annotated[int, Ge(0)] = 0,
    seed: int = 0,
    blocks: str | list[str] | None = None,
    channel_axis: int | None = None,
    concatenate: bool | None = None,
) -> RepairResult:
    """Train the merged weights so that each task's feature is its expert's: mean |z − z_expert| over batch and dim.

    A step takes `batch_size` inputs of every task. `layers="blocks"` adds the distances after the blocks, between means
    over positions: their mean over blocks, each in the unit of the final one. `parameters` are trained: all, those of
    normalisation layers, or LoRA factors of this `rank`, which are added to the weights in the end. Dropout is off;
    BatchNorm keeps its statistics, unless `statistics="updated"`, which normalises by the batch of all tasks. A share
    `held_out` of each task's inputs is not learned from, and the weights with the smallest final distance on them are
    kept. Each input that is learned from may be joined by so many `mixed` ones, λ x + (1 − λ) x′ of two inputs of its
    task (https://arxiv.org/abs/1710.09412), with the expert's feature of the mixture for their target: few inputs then
    bear more steps. Weights are float32 while they are trained; the result has the module's dtypes. `blocks` and
    `channel_axis`: see `find_blocks`; `concatenate`: see `deep`.
    """
    layout = {"forward": problem.forward, "blocks": blocks, "channel_axis": channel_axis}
    chosen = find_blocks(problem.module, problem.inputs[problem.tasks[0]], **layout) if layers == "blocks" else ()
    network = Network(master_copy(problem.module), problem.forward, chosen)
    buffers = _moving_statistics(network.module, problem.inputs) if statistics == "updated" else []
    together = bool(buffers) or check_concatenation(concatenate, network.module, None)
    weights = trained_weights(network.module, parameters, rank, seed, problem.base)

    learned, kept = _held_out(problem.inputs, held_out, seed)
    learned = {task: with_mixtures(rows, mixed, task, seed) for task, rows in learned.items()}
    order = Order(learned, steps, batch_size, seed, whole=problem.cache is not None)
    team = Team() if buffers else problem.team  # statistics of a batch need the whole batch
    distances = _Distances(problem, network, {task: order.inputs(task) for task in learned}, chosen, loss, team)
    alone = _Distances(problem, network, kept, (), loss, Team())
    check = partial(_mean_distance, alone, fixed_size(problem.encode_batch), problem.team)
    fused = problem.device.type == "cuda"  # without copies of all weights at once
    chosen_optimizer = _OPTIMIZERS[optimizer](weights, lr=lr, weight_decay=weight_decay, fused=fused)
    training = Training(weights, chosen_optimizer, buffers=buffers, check=check if kept else None, team=team)
    rates = [lr * (one_cycle(step, steps) if schedule == "one_cycle" else 1) for step in range(steps)]
    options = {"resume": problem.resume, "on_step": problem.on_step}
    history = train(training, partial(_losses, distances, order, together), rates, **options)

    fold(network.module)
    trained = with_weights_of(problem.module, network.module)
    model = StaticModel(trained, problem.tasks, forward=problem.forward, kind="distil")
    notes = (_kept_note(training.checks, kept, steps),) if kept else ()
    return RepairResult("distil", model, history, warnings=notes, passes=problem.passes)


class _Distances:
    """The distances (task,) between the features of a network and those of the tasks' experts on `inputs`.

    `blocks`: all of the network's, or none for the final feature alone. Of the inputs of a batch this process takes its
    share in the `team`, so that distances add up over processes.
    """

    def __init__(
        self,
        problem: Problem,
        network: Network,
        inputs: Mapping[str, Inputs],
        blocks: tuple[Block, ...],
        loss: Loss,
        team: Team,
    ):
        self.network, self.passes, self.team = network, problem.passes, team
        self.inputs, self.blocks, self.distance = list(inputs.values()), blocks, _DISTANCES[loss]
        self.targets = [problem.expert_rows(task, rows, blocks) for task, rows in inputs.items()]
        self.weights = [_layer_weights(by_layer(rows, blocks), self.distance) for rows in self.targets]

    def __call__(self, indices: Mapping[int, Tensor], which: Sequence[int]) -> Float[Tensor, " task"]:
        """The distances of some tasks on a batch of each, with a graph; in one pass if the batches can be joined."""
        shares = {t: self.team.share(len(indices[t])) for t in which}
        own = {t: indices[t][share] for t, (share, _) in shares.items()}
        parts = [take(self.inputs[t], own[t]) for t in which]
        if not all(joinable(parts[0], part) for part in parts):  # texts of different lengths: task by task
            return torch.cat([self(indices, [t]) for t in which])
        inputs = _in_full_precision(to_device(concatenated(parts), self.network.device))
        self.passes.merged += sum(len(indices[t]) for t in which)
        targets = torch.stack([self.targets[t][own[t]] for t in which]).to(self.network.device)
        goals, found = by_layer(_in_full_precision(targets), self.blocks), []
        unseen = len(self.network.blocks) - len(self.blocks)

        def visit(i: int, rows: Tensor) -> None:
            if i >= unseen:
                goal = goals[i - unseen]
                found.append(self.distance(position_mean(rows, inputs).to(goal).view_as(goal), goal))

        self.network(inputs, visit)
        weights = torch.stack([shares[t][1] * self.weights[t] for t in which]).to(found[0])
        return (torch.stack(found, dim=1) * weights).sum(1)


def _losses(distances: _Distances, order: Order, together: bool, step: int) -> Iterator[Tensor]:
    """The distances at a step: of all tasks together, or task by task, so that one graph at a time is in memory."""
    indices, tasks = dict(enumerate(order(step))), range(len(order.used))
    for group in [tasks] if together else [[task] for task in tasks]:
        yield distances(indices, group)


@torch.no_grad()
def _mean_distance(distances: _Distances, batch_size: int, team: Team) -> float:
    """The mean over tasks of the distance on all inputs; the processes of the team share the batches."""
    totals = []
    with evaluation_mode(distances.network.module):
        for t, inputs in enumerate(distances.inputs):
            positions, before = torch.arange(size(inputs)).split(batch_size), distances.passes.merged
            parts = team.each(lambda at, t=t: len(at) * distances({t: at}, [t]).cpu(), positions)
            totals.append(torch.cat(list(parts)).sum().item() / size(inputs))
            distances.passes.merged = before + size(inputs)
    return sum(totals) / len(totals)


def _l1(rows: Tensor, goal: Tensor) -> Float[Tensor, " task"]:
    return (rows - goal).abs().mean((1, 2))


def _mse(rows: Tensor, goal: Tensor) -> Float[Tensor, " task"]:
    return (rows - goal).square().mean((1, 2))


_DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l1": _l1, "mse": _mse}


def _layer_weights(layers: Sequence[Tensor], distance: Callable[[Tensor, Tensor], Tensor]) -> Float[Tensor, " layer"]:
    """1 for the final feature; the blocks share 1, each in units of its spread around the mean; 0 for constant ones."""
    spreads = [distance(rows[None].double(), rows.double().mean(0).expand(1, *rows.shape)) for rows in layers]
    relative = torch.cat([spreads[-1] / spread if spread > 0 else torch.zeros(1) for spread in spreads])
    return torch.cat([relative[:-1] / max(1, len(layers) - 1), torch.ones(1)])


def _moving_statistics(module: nn.Module, inputs: Mapping[str, Inputs]) -> list[Tensor]:
    """Let BatchNorm normalise by the batch of all tasks, and follow it; returns its statistics."""
    parts = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    if not parts:
        kind = type(module).__name__
        raise ConfigError(f"statistics=updated: the module ({kind}) has no BatchNorm. Remedy: statistics=frozen.")
    first, *others = (take(rows, slice(0, 1)) for rows in inputs.values())
    if not all(joinable(first, other) for other in others):
        raise ConfigError(
            "statistics=updated: the inputs of the tasks have different shapes; wanted one batch of all tasks. "
            "Remedy: statistics=frozen."
        )
    return [buffer for part in parts for buffer in part.train().buffers()]


def _in_full_precision(inputs: Any) -> Any:
    """The inputs of a half-precision module for its master copy."""
    if isinstance(inputs, Mapping):
        return {key: _in_full_precision(value) for key, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return tuple(_in_full_precision(value) for value in inputs)
    floating = isinstance(inputs, Tensor) and inputs.is_floating_point()
    return inputs.to(compute_dtype(inputs.dtype)) if floating else inputs


def _held_out(inputs: Mapping[str, Inputs], share: float, seed: int) -> tuple[dict[str, Inputs], dict[str, Inputs]]:
    """The inputs to learn from, and those to check on: at least one of each of every task, unless the share is 0."""
    learned, kept = dict(inputs), {}
    for task, rows in inputs.items() if share else ():
        count, total = max(1, round(share * size(rows))), size(rows)
        if count >= total:
            raise DataError(f"held_out={share}: task {task!r} has {total} inputs. Remedy: more inputs, or held_out=0.")
        order = torch.randperm(total, generator=generator_for(seed, f"{task}/held out"))
        learned[task], kept[task] = take(rows, order[count:].sort().values), take(rows, order[:count].sort().values)
    return learned, kept


def _kept_note(checks: Mapping[int, float], kept: Mapping[str, Inputs], steps: int) -> str:
    best = min(checks, key=checks.__getitem__)
    inputs = sum(map(size, kept.values()))
    return (
        f"The weights are those after {best} of {steps} steps: their distance on {inputs} held-out inputs was the "
        f"smallest, {checks[best]:.4g} (after the last step {checks[steps]:.4g})."
    )
