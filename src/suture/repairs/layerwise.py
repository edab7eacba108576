"""SurgeryV2's modules fitted one block after another: no backward pass through the network.

With the modules before it fixed, a block's tokens are constants, so its module is fitted like that of the final
feature: to its own term of the loss. Each block costs a forward pass, up to itself, over the inputs in use.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from suture.core.batches import size, to_device
from suture.errors import ConfigError
from suture.repairs.fitting import Descent, Optimizer, descend, fit_constants
from suture.repairs.modules import SurgeryModules
from suture.repairs.network import Network
from suture.repairs.problem import OnStep, Order, Problem, split
from suture.storage.resume import Resume


def fit_layerwise(
    problem: Problem,
    network: Network,
    repairs: Mapping[str, SurgeryModules],
    wanted: Sequence[Tensor],
    order: Order,
    steps: int,
    lr: float,
    optimizer: Optimizer,
) -> Tensor:
    """Fit the modules of all places in turn; the losses (step, task), summed over places."""
    if optimizer != "adam":
        raise ConfigError(f"optimizer={optimizer}: a layerwise fit has one Adam for each task and place.")
    modules, total = list(repairs.values()), torch.zeros(steps, len(wanted), dtype=torch.float64)
    stages = [(i, t) for i in range(len(modules)) for t in range(len(wanted))]
    goals = [task.split([m.down.shape[2] for m in modules], dim=1) for task in wanted]
    for m in modules:
        m.clear()
    first = _take_up(problem.resume, modules, total)
    for number, (i, t) in list(enumerate(stages))[first:]:
        rows = _tokens(problem, network, modules[: i + 1], t, order)
        masks = _mask(order.inputs(problem.tasks[t]), rows)
        _set_mean(modules[i], t, rows, masks)
        batches = lambda s, t=t: [order(s)[t]]
        losses = fit_constants(modules[i], slice(t, t + 1), [rows], [goals[t][i]], batches, masks)
        descent = Descent([modules[i]], [slice(t, t + 1)], lr, "adam")
        resume = None if problem.resume is None else _Stage(problem.resume, number, modules, total)
        on_step = _counting(problem.on_step, number * steps, t, len(wanted))
        total[:, t] += descend(descent, steps, losses, repairs, resume=resume, on_step=on_step)[:, 0]
        _note_active(modules[i], t, rows)
    return total


class _Stage:
    """The part of a state file that belongs to one place and task; the modules of the others go with it."""

    def __init__(self, resume: Resume, number: int, modules: Sequence[SurgeryModules], total: Tensor):
        self.resume, self.number, self.modules, self.total = resume, number, modules, total

    def load(self) -> dict[str, Any] | None:
        state = self.resume.load()
        return state["inner"] if state is not None and state["stage"] == self.number else None

    def due(self) -> bool:
        return self.resume.due()

    def save(self, state: Mapping[str, Any]) -> None:
        others = [dict(m.state_dict()) for m in self.modules]
        fired = [m.fired for m in self.modules]
        outer = {"stage": self.number, "modules": others, "fired": fired, "total": self.total}
        self.resume.save({**outer, "inner": dict(state)})


def _take_up(resume: Resume | None, modules: Sequence[SurgeryModules], total: Tensor) -> int:
    """Restore what a state file has; the stage to go on with."""
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
    """One task's tokens at the place of the last of the modules, with the others' corrections before it."""
    inputs, which, found = order.inputs(problem.tasks[task]), slice(task, task + 1), []

    def visit(i: int, rows: Tensor) -> Tensor:
        if i == len(modules) - 1:
            found.append(rows)
            raise _Reached
        return modules[i](rows, which)

    for batch in split(inputs, problem.encode_batch):
        with suppress(_Reached):
            network(to_device(batch, network.device), visit)
    problem.passes.merged += size(inputs)
    longest = max(rows.shape[1] for rows in found)
    return torch.cat([pad(rows, (0, 0, 0, longest - rows.shape[1])) for rows in found])


def _mask(inputs: Any, rows: Tensor) -> list[Tensor] | None:
    """Which positions of texts are not padding."""
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return None if mask is None or not 1 < rows.shape[1] <= mask.shape[1] else [mask[:, : rows.shape[1]]]


class _Reached(Exception):
    """The forward pass has come to where it was wanted."""


@torch.no_grad()
def _set_mean(modules: SurgeryModules, task: int, rows: Tensor, masks: list[Tensor] | None) -> None:
    if modules.mean is not None:
        real = rows if masks is None else rows[masks[0].to(rows.device) > 0][None]
        modules.mean[task] = real.mean((0, 1), dtype=torch.float64)


@torch.no_grad()
def _note_active(modules: SurgeryModules, task: int, rows: Tensor) -> None:
    assert modules.fired is not None
    modules.fired[task] = False
    for part in rows.split(64):
        modules(part, slice(task, task + 1))


def _counting(on_step: OnStep | None, start: int, task: int, tasks: int) -> OnStep | None:
    """Steps counted over all places and tasks; the other tasks' losses are nan."""
    if on_step is None:
        return None

    def told(step: int, loss: Tensor, places: Mapping[str, SurgeryModules]) -> None:
        losses = torch.full((tasks,), torch.nan, dtype=torch.float64)
        losses[task] = loss[0]
        on_step(start + step, losses, places)

    return told
