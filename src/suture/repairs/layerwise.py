"""SurgeryV2's modules fitted one block after another, without a backward pass through the network.

With the earlier modules fixed, a block's tokens are constants, so its module is fitted like that of the final feature:
to its own term of the loss. Each block costs a forward pass, up to that block, over the inputs in use.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from suture.core.batch_sizes import fixed_size
from suture.core.batches import Reached, size, split, to_device
from suture.errors import ConfigError
from suture.repairs.fitting import Descent, Optimizer, constant_losses, descend
from suture.repairs.modules import SurgeryModules
from suture.repairs.network import Network
from suture.repairs.problem import OnStep, Order, Problem
from suture.storage.resume import Resume


def fit_layerwise(
    problem: Problem,
    network: Network,
    repairs: Mapping[str, SurgeryModules],
    targets: Sequence[Tensor],
    order: Order,
    steps: int,
    lr: float,
    optimizer: Optimizer,
) -> Tensor:
    """Fit the modules of all layers in turn; returns the losses (step, task), summed over layers."""
    if optimizer != "adam":
        raise ConfigError(f"optimizer={optimizer}: a layerwise fit has one Adam for each task and layer.")
    modules, total = list(repairs.values()), torch.zeros(steps, len(targets), dtype=torch.float64)
    stages = [(i, t) for i in range(len(modules)) for t in range(len(targets))]
    by_layer = [task.split([m.down.shape[2] for m in modules], dim=1) for task in targets]
    for m in modules:
        m.clear()
    first = _restore(problem.resume, modules, total)
    for number, (i, t) in list(enumerate(stages))[first:]:
        rows = _tokens(problem, network, modules[: i + 1], t, order)
        masks = _mask(order.inputs(problem.tasks[t]), rows)
        _set_mean(modules[i], t, rows, masks)
        batches = partial(_batch_of, order, t)
        losses = constant_losses(modules[i], slice(t, t + 1), [rows], [by_layer[t][i]], batches, masks)
        descent = Descent([modules[i]], [slice(t, t + 1)], lr, "adam")
        resume = None if problem.resume is None else _Stage(problem.resume, number, modules, total)
        on_step = _counting(problem.on_step, number * steps, t, len(targets))
        total[:, t] += descend(descent, steps, losses, repairs, resume=resume, on_step=on_step)[:, 0]
        _record_active(modules[i], t, rows)
    return total


def _batch_of(order: Order, task: int, step: int) -> list[Tensor]:
    return [order(step)[task]]


class _Stage:
    """The state of the fit of one layer and task, saved in one file with the modules of all layers."""

    def __init__(self, resume: Resume, number: int, modules: Sequence[SurgeryModules], total: Tensor):
        self.resume, self.number = resume, number
        self.modules, self.total = modules, total

    def load(self) -> dict[str, Any] | None:
        state = self.resume.load()
        return state["inner"] if state is not None and state["stage"] == self.number else None

    def due(self) -> bool:
        return self.resume.due()

    def save(self, state: Mapping[str, Any]) -> None:
        tensors = [dict(m.state_dict()) for m in self.modules]
        fired = [m.fired for m in self.modules]
        outer = {"stage": self.number, "modules": tensors, "fired": fired, "total": self.total}
        self.resume.save({**outer, "inner": dict(state)})


def _restore(resume: Resume | None, modules: Sequence[SurgeryModules], total: Tensor) -> int:
    """Restore modules and losses from a state file, if any; returns the stage to continue with."""
    state = None if resume is None else resume.load()
    if state is None:
        return 0
    for m, tensors, fired in zip(modules, state["modules"], state["fired"], strict=True):
        m.load_state_dict(tensors)
        m.fired = fired.to(m.down.device)
    total.copy_(state["total"])
    return state["stage"]


@torch.no_grad()
def _tokens(
    problem: Problem, network: Network, modules: Sequence[SurgeryModules], task: int, order: Order
) -> Float[Tensor, "input position dim"]:
    """One task's tokens at the layer of the last of `modules`, corrected by the modules before it."""
    inputs, which = order.inputs(problem.tasks[task]), slice(task, task + 1)
    tokens: list[Tensor] = []

    def visit(i: int, rows: Tensor) -> Tensor:
        if i == len(modules) - 1:
            tokens.append(rows)
            if not problem.team.sharded:  # where layers are gathered, passes go to their end
                raise Reached
        return modules[i](rows, which) if i < len(modules) - 1 else rows

    for batch in split(inputs, fixed_size(problem.encode_batch)):
        with suppress(Reached):
            network(to_device(batch, network.device), visit)
    problem.passes.merged += size(inputs)
    longest = max(rows.shape[1] for rows in tokens)
    return torch.cat([pad(rows, (0, 0, 0, longest - rows.shape[1])) for rows in tokens])


def _mask(inputs: Any, rows: Tensor) -> list[Tensor] | None:
    """The attention mask of texts, cut to the tokens' length; None for other inputs."""
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return None if mask is None or not 1 < rows.shape[1] <= mask.shape[1] else [mask[:, : rows.shape[1]]]


@torch.no_grad()
def _set_mean(modules: SurgeryModules, task: int, rows: Tensor, masks: list[Tensor] | None) -> None:
    if modules.mean is not None:
        real = rows if masks is None else rows[masks[0].to(rows.device) > 0][None]
        modules.mean[task] = real.mean((0, 1), dtype=torch.float64)


@torch.no_grad()
def _record_active(modules: SurgeryModules, task: int, rows: Tensor) -> None:
    assert modules.fired is not None
    modules.fired[task] = False
    for part in rows.split(64):
        modules(part, slice(task, task + 1))


def _counting(on_step: OnStep | None, start: int, task: int, tasks: int) -> OnStep | None:
    """`on_step` with steps counted over all layers and tasks, and nan for the other tasks' losses."""
    if on_step is None:
        return None

    def counted(step: int, loss: Tensor, layers: Mapping[str, SurgeryModules]) -> None:
        losses = torch.full((tasks,), torch.nan, dtype=torch.float64)
        losses[task] = loss[0]
        on_step(start + step, losses, layers)

    return counted
