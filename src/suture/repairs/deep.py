"""SurgeryV2: modules after every block, on all tokens, and on the final feature. https://arxiv.org/abs/2410.14389

The corrected tokens of a block feed the next one. The loss of a task is the sum over blocks of the L1 distance between
the means over tokens, corrected and the expert's, plus that of the final feature. The expert runs its own path, so its
side is constant: one row of (sum of widths + dim) numbers for each input. The backbone is frozen: only gradients of
activations are computed.

The mean runs over all positions; of texts that come with an `attention_mask`, over those that are not padding.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from suture.adaptation.network import check_concatenation
from suture.core.batches import concatenate as concatenated
from suture.core.batches import joinable, size, take, to_device
from suture.merging.task_vectors import compute_dtype
from suture.repairs.final import set_means
from suture.repairs.fitting import Descent, Losses, Optimizer, descend
from suture.repairs.layerwise import fit_layerwise
from suture.repairs.modules import SurgeryModules
from suture.repairs.network import FINAL, Block, Network, by_place, find_blocks, position_mean
from suture.repairs.problem import Order, Problem
from suture.repairs.registry import repair_kind
from suture.repairs.results import RepairResult, surgery_result


@repair_kind(paper="https://arxiv.org/abs/2410.14389")
def deep(
    problem: Problem,
    *,
    rank: Annotated[int, Ge(1)] = 16,
    steps: Annotated[int, Ge(1)] = 1000,
    lr: Annotated[float, Gt(0)] = 1e-3,
    batch_size: Annotated[int, Ge(1)] = 16,
    seed: int = 0,
    optimizer: Optimizer = "adam",
    variant: Literal["standard", "centred"] = "standard",
    fit: Literal["joint", "layerwise"] = "joint",
    blocks: str | list[str] | None = None,
    channel_axis: int | None = None,
    concatenate: bool | None = None,
) -> RepairResult:
    """Fit modules after every block and on the final feature, by Adam.

    `fit="layerwise"` fits them one block after another, each to its own term of the loss with the modules before it
    fixed, with no backward pass through the network; it holds all tokens of one block and task in memory, and its steps
    are counted over all places and tasks, with losses of nan for the tasks whose turn it is not. `blocks` and
    `channel_axis`: see `find_blocks`. `concatenate` runs all tasks in one pass; by default where this is exact, but
    on a CPU only for networks below ten million parameters.
    """
    find = {"forward": problem.forward, "blocks": blocks, "channel_axis": channel_axis}
    found = find_blocks(problem.module, problem.inputs[problem.tasks[0]], **find)
    network = Network(problem.module, problem.forward, found)
    together = check_concatenation(concatenate, network.module, None)
    order = Order(problem.inputs, steps, batch_size, seed, whole=problem.cache is not None)
    wanted = [problem.expert_rows(task, order.inputs(task), found) for task in problem.tasks]
    repairs = new_modules(problem, found, wanted[0], rank, seed, variant)

    if fit == "layerwise":
        history = fit_layerwise(problem, network, repairs, wanted, order, steps, lr, optimizer)
        return surgery_result("deep", problem, repairs, history, found)
    if variant == "centred":
        merged = [problem.merged_rows(task, order.inputs(task), found) for task in problem.tasks]
        for modules, *rows in zip(repairs.values(), *(by_place(task, found) for task in merged), strict=True):
            set_means(modules, rows)
    everyone = [slice(0, len(wanted))] if together else [slice(t, t + 1) for t in range(len(wanted))]
    descent = Descent(list(repairs.values()), everyone, lr, optimizer)
    losses = deep_losses(problem, network, list(repairs.values()), wanted, order)
    last = -(-max(map(len, wanted)) // batch_size)  # steps in which every input comes up
    options = {"resume": problem.resume, "on_step": problem.on_step}
    history = descend(descent, steps, losses, repairs, watched=last, **options)
    return surgery_result("deep", problem, repairs, history, found)


def new_modules(
    problem: Problem, blocks: Sequence[Block], rows: Tensor, rank: int, seed: int, variant: Any = "standard"
) -> dict[str, SurgeryModules]:
    """Modules for every place, by its name; `rows` are encodings of any task."""
    dims = {block.path: block.dim for block in blocks}
    dims[FINAL] = rows.shape[1] - sum(dims.values())
    options = {"variant": variant, "seed": seed, "dtype": compute_dtype(rows.dtype)}
    return {
        place: SurgeryModules(problem.tasks, dim, rank, place=place, **options).to(problem.device)
        for place, dim in dims.items()
    }


def deep_losses(
    problem: Problem,
    network: Network,
    repairs: Sequence[SurgeryModules],
    wanted: Sequence[Tensor],
    batches: Callable[[int], Sequence[Tensor]],
) -> Losses:
    """The losses of some tasks at a step, with a graph through the corrected network.

    The batches are positions in `wanted`, and in the inputs that it was encoded from.
    """
    used = batches.inputs if isinstance(batches, Order) else problem.inputs.__getitem__
    inputs = [used(task) for task in problem.tasks]

    def losses(step: int, which: slice) -> Tensor:
        chosen, indices = range(which.start, which.stop), batches(step)
        parts = [to_device(take(inputs[t], indices[t]), network.device) for t in chosen]
        if not all(joinable(parts[0], part) for part in parts):  # lengths differ: one task after another
            return torch.cat([losses(step, slice(t, t + 1)) for t in chosen])
        joined = concatenated(parts)
        problem.passes.merged += size(joined)
        goals = torch.stack([wanted[t][indices[t]] for t in chosen]).to(network.device)
        return _passed(network, repairs, joined, which, by_place(goals, network.blocks))

    return losses


def _passed(
    network: Network, repairs: Sequence[SurgeryModules], inputs: Any, which: slice, goals: Sequence[Tensor]
) -> Tensor:
    """One pass with corrections on the way: (task,) Σ over places of mean |mean over positions − goal|."""
    found: list[Tensor] = []

    def visit(i: int, rows: Tensor) -> Tensor:
        corrected = repairs[i](rows, which)
        means = position_mean(corrected, inputs).to(repairs[i].down.dtype)
        found.append((means.view_as(goals[i]) - goals[i]).abs().mean((1, 2)))
        return corrected

    network(inputs, visit)
    return torch.stack(found).sum(0)
