"""Online Representation Surgery: one pass over a stream of single inputs, with one Adam step for each.

https://arxiv.org/abs/2402.02705, online setting: tasks one after another, encoders frozen. Features do not depend on
the modules, so they are computed in larger batches beforehand, each input once by each model.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from suture.core.batches import Inputs, ShuffledBatches, size
from suture.errors import ConfigError
from suture.merging.task_vectors import compute_dtype
from suture.repairs.fitting import Descent, constant_losses, descend
from suture.repairs.model import SurgeryModel
from suture.repairs.modules import SurgeryModules
from suture.repairs.network import FINAL
from suture.repairs.problem import Problem
from suture.repairs.registry import repair_kind
from suture.repairs.results import RepairResult, Stream

FRACTIONS = (0.01, *(k / 10 for k in range(1, 11)))


@repair_kind(paper="https://arxiv.org/abs/2402.02705")
def online(
    problem: Problem,
    *,
    rank: Annotated[int, Ge(1)] = 16,
    lr: Annotated[float, Gt(0)] = 1e-3,
    seed: int = 0,
    shuffle: bool = True,
    fractions: Sequence[float] = FRACTIONS,
    variant: Literal["standard", "normalised"] = "standard",
) -> RepairResult:
    """Fit ẑ = z − U·ReLU(D·z) while inputs arrive one at a time.

    `fractions` are shares of each task's stream, in (0, 1], after which the modules are copied (`result.stages`); they
    are rounded up to whole inputs. With `shuffle` the order depends on the seed and the task's name; otherwise it is
    the inputs' own. There is no centred variant, because it would need the mean of future inputs.

    >>> from torch import nn
    >>> problem = Problem(nn.Linear(3, 4), {"mnist": nn.Linear(3, 4)}, {"mnist": torch.randn(10, 3)})
    >>> list(online(problem, rank=2, fractions=[0.1, 1.0]).stages)
    [0.1, 1.0]
    """
    if wrong := [share for share in fractions if not 0 < share <= 1]:
        raise ConfigError(f"fractions: {wrong[0]} is not a share of the stream; wanted more than 0 and 1 at most.")
    order = {task: _order(task, inputs, seed, shuffle) for task, inputs in problem.inputs.items()}
    streams = [_stream(problem, task, positions) for task, positions in order.items()]
    dim, dtype = streams[0][0].shape[1], compute_dtype(streams[0][0].dtype)
    modules = SurgeryModules(problem.tasks, dim, rank, variant=variant, seed=seed, dtype=dtype).to(problem.device)

    snapshots = {share: modules.copied() for share in sorted(set(fractions))}
    outputs, losses = {}, {}
    for t, task in enumerate(problem.tasks):
        outputs[task], losses[task] = _run(modules, t, *streams[t], lr, snapshots)
    models = {
        share: SurgeryModel(problem.module, {FINAL: copied}, problem.tasks, forward=problem.forward, kind="online")
        for share, copied in snapshots.items()
    }
    last = models[max(models)]
    history = pad_sequence([losses[task] for task in problem.tasks], padding_value=math.nan)
    return RepairResult(
        "online",
        last,
        history,
        added_parameters=last.added_parameters,
        passes=problem.passes,
        stages=models,
        stream=Stream(order, outputs),
    )


def _order(task: str, inputs: Inputs, seed: int, shuffle: bool) -> Int[Tensor, " input"]:
    whole = ShuffledBatches(inputs, size(inputs), seed=seed, name=task)
    return whole.indices(0) if shuffle else torch.arange(size(inputs))


def _stream(problem: Problem, task: str, positions: Tensor) -> tuple[Tensor, Tensor]:
    inputs = problem.inputs[task]
    return problem.merged_rows(task, inputs)[positions], problem.expert_rows(task, inputs)[positions]


def _run(
    modules: SurgeryModules,
    task: int,
    merged: Tensor,
    targets: Tensor,
    lr: float,
    snapshots: Mapping[float, SurgeryModules],
) -> tuple[Tensor, Tensor]:
    """Fit one task's stream; returns its outputs and losses before each step, and updates the snapshots."""
    which, ends = slice(task, task + 1), {share: math.ceil(share * len(merged)) for share in snapshots}
    rows, outputs = merged[:, None], []
    losses = constant_losses(modules, which, [rows], [targets], lambda step: [torch.tensor([step])])

    def losses_and_output(step: int, group: slice) -> Tensor:
        with torch.no_grad():
            outputs.append(modules(rows[step : step + 1].to(modules.down.device), which)[:, 0].cpu())
        return losses(step, group)

    def snapshot(step: int, loss: Tensor, layers: Mapping[str, SurgeryModules]) -> None:
        for share, end in ends.items():
            if end == step + 1:
                snapshots[share].take(modules, task)

    descent = Descent([modules], [which], lr, "adam")
    history = descend(descent, len(merged), losses_and_output, {FINAL: modules}, small=True, on_step=snapshot)
    return torch.cat(outputs), history[:, 0]
