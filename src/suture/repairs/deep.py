"""SurgeryV2: modules after every block, on all tokens, and on the final feature. https://arxiv.org/abs/2410.14389

The corrected tokens of a block are the input of the next one. A task's loss is the sum over blocks of the L1 distance
between the corrected and the expert's means over tokens, plus the distance between the final features. The expert is
not corrected, so its side is constant: one row of (sum of widths + dim) numbers per input. The backbone is frozen, so
only gradients of activations are computed.

Means are over all positions, or, for texts with an `attention_mask`, over those that are not padding.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from suture.adaptation.network import check_concatenation
from suture.core.autocasting import frozen_weights_in
from suture.core.batches import concatenate as concatenated
from suture.core.batches import joinable, size, take, to_device
from suture.merging.task_vectors import compute_dtype
from suture.repairs.captured import capture_of
from suture.repairs.final import set_means
from suture.repairs.fitting import BatchLosses, Descent, Optimizer, descend
from suture.repairs.layerwise import fit_layerwise
from suture.repairs.modules import SurgeryModules, Variant, auto_variants
from suture.repairs.network import FINAL, Block, Network, by_layer, find_blocks, layers_of, position_mean
from suture.repairs.problem import Order, Problem
from suture.repairs.registry import repair_kind
from suture.repairs.resident import Batches, resident
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
    variant: Literal["auto", "standard", "centred"] = "auto",
    fit: Literal["joint", "layerwise"] = "joint",
    blocks: str | list[str] | None = None,
    channel_axis: int | None = None,
    concatenate: bool | None = None,
    capture: bool = False,
) -> RepairResult:
    """Fit modules after every block and on the final feature, by Adam.

    `variant="auto"` is decided for each layer on the tokens of the first batch of every task: `centred` where nearly
    all are non-negative, as after a ReLU, and `standard` elsewhere; see `auto_variants`.

    `fit="layerwise"` fits them one block after another, each to its own term of the loss with the modules before it
    fixed, without a backward pass through the network. It holds all tokens of one block and task in memory. Its steps
    are counted over all layers and tasks, and losses are nan for the tasks that are not being fitted. `blocks` and
    `channel_axis`: see `find_blocks`. `concatenate` runs all tasks in one pass; by default where this is exact, but
    on a CPU only for networks below ten million parameters. With `capture` a step of a joint fit is recorded on a GPU
    as a CUDA graph and replayed.
    """
    module, forward = problem.running
    layout = {"forward": forward, "blocks": blocks, "channel_axis": channel_axis}
    network = problem.network(find_blocks(module, problem.inputs[problem.tasks[0]], **layout))
    chosen = network.blocks
    together = check_concatenation(concatenate, network.module, None)
    order = Order(problem.inputs, steps, batch_size, seed, whole=problem.cache is not None)
    targets = [problem.expert_rows(task, order.inputs(task), chosen) for task in problem.tasks]
    variants, notes = _first_variants(problem, network, order) if variant == "auto" else (variant, ())
    repairs = new_modules(problem, chosen, targets[0], rank, seed, variants)

    if fit == "layerwise":
        history = fit_layerwise(problem, network, repairs, targets, order, steps, lr, optimizer)
        return surgery_result("deep", problem, repairs, history, chosen, notes=notes)
    if any(modules.mean is not None for modules in repairs.values()):
        merged = [problem.merged_rows(task, order.inputs(task), chosen) for task in problem.tasks]
        for modules, *rows in zip(repairs.values(), *(by_layer(task, chosen) for task in merged), strict=True):
            set_means(modules, rows)
    groups = [slice(0, len(targets))] if together else [slice(t, t + 1) for t in range(len(targets))]
    recorded = capture_of("deep", problem, optimizer) if capture else None
    descent = Descent(list(repairs.values()), groups, lr, optimizer, problem.team, capturable=recorded is not None)
    losses = deep_losses(problem, network, list(repairs.values()), targets, order, steps=steps)
    last = -(-max(map(len, targets)) // batch_size)  # the final steps that use every input once
    options = {"capture": recorded, "read_every": problem.read_every}
    saving = {"resume": problem.resume, "on_step": problem.on_step}
    with frozen_weights_in(None if problem.team.sharded else network.precision, network.module):
        history = descend(descent, steps, losses, repairs, watched=last, **options, **saving)
    return surgery_result("deep", problem, repairs, history, chosen, notes=notes)


@torch.no_grad()
def _first_variants(problem: Problem, network: Network, order: Order) -> tuple[dict[str, Variant], tuple[str, ...]]:
    """`auto_variants` of the tokens of the first batch of every task."""
    layers = layers_of(network.blocks)
    tokens: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    for task, indices in zip(problem.tasks, order(0), strict=True):
        batch = to_device(take(order.inputs(task), indices), network.device)
        network(batch, lambda i, rows: tokens[layers[i]].append(rows.cpu()))
        problem.passes.merged += size(batch)
    return auto_variants(tokens)


def new_modules(
    problem: Problem,
    blocks: Sequence[Block],
    rows: Tensor,
    rank: int,
    seed: int,
    variant: Variant | Mapping[str, Variant] = "standard",
) -> dict[str, SurgeryModules]:
    """Layer → modules, for every block and the final feature; `rows` are encodings of any task.

    `variant`: that of all layers, or of each.
    """
    dims = {block.path: block.dim for block in blocks}
    dims[FINAL] = rows.shape[1] - sum(dims.values())
    options = {"seed": seed, "dtype": compute_dtype(rows.dtype)}
    variants: Mapping[str, Variant] = variant if isinstance(variant, Mapping) else dict.fromkeys(dims, variant)
    return {
        layer: SurgeryModules(problem.tasks, dim, rank, layer=layer, variant=variants[layer], **options).to(
            problem.device
        )
        for layer, dim in dims.items()
    }


def deep_losses(
    problem: Problem,
    network: Network,
    repairs: Sequence[SurgeryModules],
    targets: Sequence[Tensor],
    batches: Batches,
    *,
    steps: int | None = None,
) -> BatchLosses:
    """The losses of some tasks at a step, with a graph through the corrected network: this process's share of them.

    The batches are positions in the `targets`, and in the inputs that these were encoded from. Given the number of
    `steps`, an accelerator keeps inputs and targets that fit, and draws the batches there.
    """
    used = batches.inputs if isinstance(batches, Order) else problem.inputs.__getitem__
    inputs = [used(task) for task in problem.tasks]
    kept = resident([inputs, targets], batches, steps, network.device)
    count = len(batches(0)[0])
    own, weight = problem.team.share(count)

    def batch(step: int, which: slice) -> dict[str, Any]:
        chosen = range(which.start, which.stop)
        if kept is not None:
            problem.passes.merged += count * len(chosen)
            return {"positions": kept.positions(step)[which][:, own]}
        indices = [at[own] for at in batches(step)]
        parts = [to_device(take(inputs[t], indices[t]), network.device) for t in chosen]
        if not all(joinable(parts[0], part) for part in parts):  # texts of different lengths: task by task
            return {"apart": [batch(step, slice(t, t + 1)) for t in chosen]}
        problem.passes.merged += count * len(chosen)
        expected = torch.cat([targets[t][indices[t]] for t in chosen]).to(network.device)
        return {"rows": (concatenated(parts), expected)}

    def of(given: Mapping[str, Any], which: slice) -> Tensor:
        if "apart" in given:
            singly = zip(given["apart"], range(which.start, which.stop), strict=True)
            return torch.cat([of(one, slice(t, t + 1)) for one, t in singly])
        joined, expected = given["rows"] if kept is None else kept.take(given["positions"])
        goals = by_layer(expected.view(which.stop - which.start, -1, expected.shape[-1]), network.blocks)
        return weight * _pass_losses(network, repairs, joined, which, goals)

    return BatchLosses(batch, of)


def _pass_losses(
    network: Network, repairs: Sequence[SurgeryModules], inputs: Any, which: slice, targets: Sequence[Tensor]
) -> Tensor:
    """One corrected pass: (task,) Σ over layers of mean |mean over positions − target|.

    The means of neighbouring layers of one width are compared with their targets at once.
    """
    found: list[Tensor] = []

    def visit(i: int, rows: Tensor) -> Tensor:
        corrected = repairs[i](rows, which)
        found.append(position_mean(corrected, inputs).to(repairs[i].down.dtype).view_as(targets[i]))
        return corrected

    network(inputs, visit)
    distances: list[Tensor] = []
    for _, pairs in groupby(zip(found, targets, strict=True), key=lambda pair: (pair[0].shape, pair[0].dtype)):
        means, goals = map(torch.stack, zip(*pairs, strict=True))
        distances.append((means - goals).abs().mean((2, 3)))
    return torch.cat(distances).sum(0)
