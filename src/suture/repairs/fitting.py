"""Gradient descent on surgery modules: one Adam for each task, or the authors' one Adam for all tasks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from suture.core.fabric import Team
from suture.errors import DataError
from suture.repairs.modules import SurgeryModules
from suture.repairs.network import position_mean
from suture.repairs.problem import OnStep
from suture.repairs.resident import Batches, resident

Optimizer = Literal["adam", "shared_adam", "shared_adam_pairs"]
#: losses(step, tasks) for a slice of tasks: (task,), with a graph.
Losses = Callable[[int, slice], Tensor]


@dataclass(frozen=True)
class BatchLosses:
    """Losses in two parts: `batch(step, tasks)` brings tensors to the device, and `of(batch, tasks)` stays there."""

    batch: Callable[[int, slice], Any]
    of: Callable[[Any, slice], Tensor]

    def __call__(self, step: int, tasks: slice, /) -> Tensor:
        return self.of(self.batch(step, tasks), tasks)


@runtime_checkable
class Saving(Protocol):
    """Storage for the state of a loop: `suture.storage.resume.Resume`, or a part of it."""

    def load(self) -> dict[str, Any] | None: ...

    def due(self) -> bool: ...

    def save(self, state: Mapping[str, Any]) -> None: ...


class Descent:
    """Optimizer steps on the stacked modules of some tasks.

    - `adam`: one Adam per task. They take the same steps at the same time, so one Adam over the stacks is equivalent.
    - `shared_adam`: one Adam over all tasks, with a step after each batch, in the order A1 B1 … A2 B2 …. From a task's
      first gradient on, every step moves it, with a zero gradient after the other tasks' batches. The authors' runs did
      so, under a PyTorch version that zeroed gradients instead of dropping them.
    - `shared_adam_pairs`: the same in the authors' order, two batches of a task and then two of the next: A1 A2 B1 B2 …
      A3 A4 B3 B4 …. Their 500 iterations are 1,000 steps.

    `groups`: the slices of tasks that share a forward and a backward pass; their gradients are added up. So are those
    of the processes of a `team`, whose losses are of their own share of the inputs. On a GPU the optimizer is one
    launch; `capturable`: its steps can be recorded.
    """

    def __init__(
        self,
        modules: Sequence[SurgeryModules],
        groups: Sequence[slice],
        lr: float,
        optimizer: Optimizer,
        team: Team | None = None,
        *,
        capturable: bool = False,
    ):
        self.modules, self.groups, self.team = list(modules), list(groups), team or Team()
        self.steps_per_turn = 2 if optimizer == "shared_adam_pairs" else 1
        self.parameters = [p.requires_grad_() for m in modules for p in m.trained]
        self._views: dict[int, list[Tensor]] = {}
        if optimizer != "adam":  # one leaf per task, in the memory of the stacks
            tasks = range(len(self.parameters[0]))
            self._views = {t: [p.detach()[t : t + 1].requires_grad_() for p in self.parameters] for t in tasks}
        leaves = [leaf for views in self._views.values() for leaf in views] or self.parameters
        fused: dict[str, Any] = {"fused": True, "capturable": capturable} if is_fused(leaves[0].device) else {}
        self.adam = torch.optim.Adam(leaves, lr=lr, **fused)

    def step(self, *losses: Callable[[slice], Tensor]) -> Float[Tensor, "step task"]:
        """Take a step of every task for each function in `losses`; returns the losses before each step, on the device.

        The gradients of the last step stay until the next one.
        """
        if not self._views:
            return _joined([self._step_of_all(function)[None] for function in losses])
        by_task = [torch.cat([self._step_of(task, function) for function in losses]) for task in self._views]
        return torch.stack(by_task, dim=1)

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        parameters = [p.detach().clone() for p in self.parameters]
        return {"parameters": parameters, "adam": self.adam.state_dict(), "fired": [m.fired for m in self.modules]}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state`."""
        for parameter, value in zip(self.parameters, state["parameters"], strict=True):
            parameter.copy_(value)
        for modules, fired in zip(self.modules, state["fired"], strict=True):
            modules.fired = fired if fired is None else fired.to(modules.down.device)
        self.adam.load_state_dict(state["adam"])
        for views in self._views.values():
            for view in views:
                view.grad = torch.zeros_like(view)

    @torch.no_grad()
    def mark(self) -> Callable[[], None]:
        """A function that puts parameters, optimizer and active units back as they are now, in the same memory."""
        before = {at: tensor.clone() for at, tensor in self._live().items()}

        @torch.no_grad()
        def put_back() -> None:
            for at, tensor in self._live().items():
                tensor.copy_(before[at]) if at in before else tensor.zero_()

        return put_back

    def _live(self) -> dict[tuple[str, ...], Tensor]:
        """Everything that a step changes; the optimizer has nothing before the first."""
        fired = {("fired", str(i)): m.fired for i, m in enumerate(self.modules) if m.fired is not None}
        parameters = {("parameter", str(i)): p.detach() for i, p in enumerate(self.parameters)}
        adam = {
            ("adam", str(i), key): value
            for i, p in enumerate(self.parameters)
            for key, value in self.adam.state.get(p, {}).items()
            if isinstance(value, Tensor)
        }
        return parameters | fired | adam

    def drop_gradients(self) -> None:
        """Free the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def _step_of_all(self, losses: Callable[[slice], Tensor]) -> Float[Tensor, " task"]:
        self.drop_gradients()
        values = _joined([self._backward(losses(group)) for group in self.groups])
        self._add_up(values)
        self.adam.step()
        return values

    def _backward(self, loss: Tensor) -> Tensor:
        loss.sum().backward(inputs=self.parameters)
        return loss.detach()

    def _step_of(self, task: int, losses: Callable[[slice], Tensor]) -> Float[Tensor, "1"]:
        """One step of the shared Adam, after a batch of one task."""
        self.drop_gradients()
        loss = self._backward(losses(slice(task, task + 1)))
        self._add_up(loss)
        for other, views in self._views.items():
            for view, parameter in zip(views, self.parameters, strict=True):
                if other == task and parameter.grad is not None:
                    view.grad = parameter.grad[task : task + 1].clone()
                elif view.grad is not None:
                    view.grad.zero_()
        self.adam.step()
        return loss

    def _add_up(self, losses: Tensor) -> None:
        """Add up gradients and losses of all processes, and mark the units that were active in any of them."""
        if self.team.world == 1:
            return
        fired = [m.fired for m in self.modules if m.fired is not None]
        counts = [marks.to(losses.dtype) for marks in fired]
        self.team.add([losses, *(p.grad for p in self.parameters if p.grad is not None), *counts])
        for marks, count in zip(fired, counts, strict=True):
            marks.copy_(count > 0)


def is_fused(device: torch.device) -> bool:
    """Whether Adam takes one launch on a device; on a CPU its sums would be rounded in another way than ever."""
    return device.type == "cuda"


@runtime_checkable
class Captured(Protocol):
    """A way to record steps: `suture.repairs.captured.Capture`."""

    steps_per_launch: int

    def steps(self, descent: Descent, losses: BatchLosses, watched: bool) -> Callable[[range], Tensor]: ...


def descend(
    descent: Descent,
    steps: int,
    losses: Losses,
    layers: Mapping[str, SurgeryModules],
    *,
    watched: int = 0,
    small: bool = False,
    read_every: int = 1,
    capture: Captured | None = None,
    resume: Saving | None = None,
    on_step: OnStep | None = None,
) -> Float[Tensor, "step task"]:
    """Take the steps that `resume` has not done; returns the losses of all. The last `watched` record active units.

    `small` steps run on one thread: with more, the threads would wait for each other longer than they work. Losses stay
    on the device until they are read, `read_every` steps or when the state is saved; then `on_step` gets those of each
    step, and the modules of all `layers` as they are after the last. A turn is never cut, which is two steps for
    `shared_adam_pairs`. With a `capture` steps are recorded and replayed, a launch in each turn; those that do not fill
    the last turn are plain.
    """
    history: list[Tensor] = []
    state = None if resume is None else resume.load()
    if state is not None:
        descent.restore(state)
        history = list(state["losses"])
    take_steps, turn = _plainly(descent, losses), descent.steps_per_turn
    if capture is not None and isinstance(losses, BatchLosses):
        take_steps, turn = capture.steps(descent, losses, watched > 0), capture.steps_per_launch
    unread: list[Tensor] = []
    for start in range(len(history), steps, turn):
        stop = min(start + turn, steps)
        if start <= max(steps - watched, 0) < stop:
            for modules in descent.modules:
                modules.clear()
        with _threads(1 if small else torch.get_num_threads()):
            unread.append(take_steps(range(start, stop)))
        save = resume is not None and (resume.due() or stop == steps)
        if not save and stop < steps and stop // read_every == start // read_every:
            continue
        first = len(history)
        history.extend(_read(unread, first))
        unread = []
        if resume is not None and save:
            resume.save({**descent.state(), "losses": torch.stack(history)})
        if on_step is not None:
            for step in range(first, stop):
                on_step(step, history[step], layers)
    descent.drop_gradients()
    return torch.stack(history)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Some tensors end to end; one alone as it is, without a copy."""
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def _plainly(descent: Descent, losses: Losses) -> Callable[[range], Tensor]:
    return lambda steps: descent.step(*(partial(losses, step) for step in steps))


def _read(unread: Sequence[Tensor], first: int) -> Tensor:
    """The losses (step, task) of the steps from `first` on, float64 on the CPU; refused if one is not finite."""
    values = _joined(unread).to("cpu", torch.float64)
    if not values.isfinite().all():
        number = int(values.isfinite().all(1).int().argmin())
        where = f"{values[number].sum().item()} at step {first + number}"
        raise DataError(f"The repair's loss is {where}. Remedy: check the inputs, or lower lr.")
    return values


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if count != before:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count != before:
            torch.set_num_threads(before)


def constant_losses(
    modules: SurgeryModules,
    group: slice,
    rows: Sequence[Tensor],
    targets: Sequence[Tensor],
    batches: Batches,
    masks: Sequence[Tensor] | None = None,
    *,
    steps: int | None = None,
) -> BatchLosses:
    """The losses of one layer's modules on constant inputs: mean |mean over positions of ẑ − target|.

    `rows` (input, position, dim), `targets` (input, dim), the batches, and `masks` (input, position), which are 0 at
    padding, have one entry per task of `group`. Given the number of `steps`, an accelerator keeps the rows and targets
    that fit, and draws the batches there.
    """
    device, dtype = modules.down.device, modules.down.dtype
    fields = [rows, targets] if masks is None else [rows, targets, masks]
    kept = resident(fields, batches, steps, device)

    def batch(step: int, which: slice) -> Any:
        own = slice(which.start - group.start, which.stop - group.start)
        if kept is not None:
            return kept.positions(step)[own]
        indices = batches(step)[own]
        return [
            torch.cat([task[at] for task, at in zip(tasks[own], indices, strict=True)]).to(device) for tasks in fields
        ]

    def of(given: Any, which: slice) -> Tensor:
        z, target, *mask = given if kept is None else kept.take(given)
        target = target.to(dtype).view(which.stop - which.start, -1, target.shape[-1])
        masked = {"attention_mask": mask[0]} if mask else {}
        repaired = position_mean(modules(z.to(dtype), which), masked).view_as(target)
        return (repaired - modules.prepared(target)).abs().mean((1, 2))

    return BatchLosses(batch, of)
