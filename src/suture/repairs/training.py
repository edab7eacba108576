"""The loop of a distillation: steps of one optimizer over weights, resumed to the same bits."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from suture.core.fabric import Team
from suture.errors import ConfigError, DataError
from suture.repairs.fitting import Saving
from suture.repairs.problem import OnStep

_CHECKS = 20  # of the held-out inputs in one run
_FIRST = 1 / 25  # of the largest learning rate


def one_cycle(step: int, steps: int) -> float:
    """The factor of the learning rate: from 1/25 up to 1 over three tenths of the steps, and down to nearly 0.

    Both ways are half cosines. https://arxiv.org/abs/1708.07120

    >>> [round(one_cycle(step, 10), 2) for step in (0, 3, 9)]
    [0.04, 1.0, 0.05]
    """
    warm = max(1, 3 * steps // 10)
    if step < warm:
        return 1 - (1 - _FIRST) * _half_cosine(step / warm)
    return _half_cosine((step - warm) / (steps - warm))


class Training:
    """The state of a training: `weights`, their optimizer, and the best weights so far if there is a `check`.

    The gradients of the processes of a `team` are added up, whose losses are of their own share of the inputs.
    `buffers` are the statistics that change with the weights. `check()` is a loss on inputs that are not learned from;
    it is computed twenty times in a run, and `finish` goes back to the weights where it was smallest.
    """

    def __init__(
        self,
        weights: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        *,
        buffers: Sequence[Tensor] = (),
        check: Callable[[], float] | None = None,
        team: Team | None = None,
    ):
        self.team = team or Team()
        self.weights, self.optimizer, self.check = list(weights), optimizer, check
        self.tensors = [*self.weights, *buffers]
        self.best: list[Tensor] = []
        self.checks: dict[int, float] = {}  # number of steps → loss

    def step(self, losses: Iterable[Float[Tensor, " task"]], lr: float) -> Float[Tensor, " task"]:
        """Take one step along the gradient of the sum of `losses`, which are computed one after another."""
        values = []
        for loss in losses:
            if not loss.requires_grad:
                raise ConfigError(
                    "`forward` gives features without a gradient; wanted one that weights can be trained through. "
                    "Remedy: leave out torch.no_grad and torch.inference_mode."
                )
            values.append(loss.detach())
            loss.sum().backward(inputs=self.weights)
        total = torch.cat(values)
        self.team.add([total, *(p.grad for p in self.weights if p.grad is not None)])
        total = total.to("cpu", torch.float64)
        if total.isfinite().all():
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    @torch.no_grad()
    def look(self, done: int, steps: int) -> None:
        """Check the weights after `done` of all steps, if it is time to."""
        if self.check is None or (done % max(1, steps // _CHECKS) and done < steps):
            return
        self.checks[done] = self.check()
        if min(self.checks, key=self.checks.__getitem__) == done:
            self.best = [tensor.detach().clone() for tensor in self.tensors]

    @torch.no_grad()
    def finish(self) -> None:
        """Go back to the best weights."""
        for tensor, value in zip(self.tensors, self.best, strict=bool(self.best)):
            tensor.copy_(value)

    def state(self, *, last: bool) -> dict[str, Any]:
        """Everything that the next step depends on; after the last one, only the weights."""
        tensors = [tensor.detach() for tensor in self.tensors]
        state = {"tensors": tensors, "best": self.best, "checks": self.checks}
        return state if last else {**state, "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state`."""
        for tensor, value in zip(self.tensors, state["tensors"], strict=True):
            tensor.copy_(value)
        self.best = [value.to(self.weights[0].device) for value in state["best"]]
        self.checks = dict(state["checks"])
        if "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])


def train(
    training: Training,
    losses: Callable[[int], Iterable[Tensor]],
    rates: Sequence[float],
    *,
    resume: Saving | None = None,
    on_step: OnStep | None = None,
) -> Float[Tensor, "step task"]:
    """Take the steps that `resume` has not done; returns the losses (step, task) before each step.

    `losses(step)` gives the losses of groups of tasks in order, `rates` the learning rate of every step. Raises
    `DataError` for a loss that is not finite.
    """
    history, steps = [], len(rates)
    state = None if resume is None else resume.load()
    if state is not None:
        training.restore(state)
        history = list(state["losses"])
        del state  # whose tensors are as large as the model
    for step in range(len(history), steps):
        values = training.step(losses(step), rates[step])
        if not math.isfinite(total := values.sum().item()):
            raise DataError(
                f"The distillation's loss is {total} at step {step}. Remedy: check the inputs, or lower lr."
            )
        history.append(values)
        training.look(step + 1, steps)
        if resume is not None and (resume.due() or step + 1 == steps):
            resume.save({**training.state(last=step + 1 == steps), "losses": torch.stack(history)})
        if on_step is not None:
            on_step(step, values, {})
    training.finish()
    return torch.stack(history)


def _half_cosine(share: float) -> float:
    """From 1 at 0 to 0 at 1."""
    return (1 + math.cos(math.pi * share)) / 2
