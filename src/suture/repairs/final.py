"""Representation Surgery: one module per task on the final feature. https://arxiv.org/abs/2402.02705

Merged model and experts are frozen, so their features are constants: each input is encoded once by each, and the
modules of all tasks are trained on the encodings as one batched product. The paper's loop, which encodes at every step,
gives the same result.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from suture.merging.task_vectors import compute_dtype
from suture.repairs.captured import capture_of
from suture.repairs.fitting import Descent, Optimizer, constant_losses, descend
from suture.repairs.modules import SurgeryModules, Variant, auto_variants
from suture.repairs.network import FINAL
from suture.repairs.problem import Order, Problem
from suture.repairs.registry import repair_kind
from suture.repairs.results import RepairResult, surgery_result

_CHUNK = 4096
_LAUNCH = 20  # steps that are recorded together


@repair_kind(paper="https://arxiv.org/abs/2402.02705", scored_while_fitting=True)
def final(
    problem: Problem,
    *,
    rank: Annotated[int, Ge(1)] = 16,
    steps: Annotated[int, Ge(1)] = 1000,
    lr: Annotated[float, Gt(0)] = 1e-3,
    batch_size: Annotated[int, Ge(1)] = 16,
    seed: int = 0,
    optimizer: Optimizer = "adam",
    variant: Variant | Literal["auto"] = "auto",
    capture: bool = False,
) -> RepairResult:
    """Fit ẑ = z − U·ReLU(D·z) to the expert's feature: mean |ẑ − z_expert| over batch and dim, by Adam.

    `variant="auto"` is `standard`, or `centred` where nearly all features are non-negative; see `auto_variants`.

    On a GPU the features are kept on the device where they fit; with `capture` twenty steps are recorded there as a
    CUDA graph and replayed.

    Without a cache, only the inputs that some step uses are encoded; with a cache, all of them, so that another rank,
    lr, seed or number of steps needs no forward pass.
    """
    order = Order(problem.inputs, steps, batch_size, seed, whole=problem.cache is not None)
    merged = [problem.merged_rows(task, order.inputs(task)) for task in problem.tasks]
    targets = [problem.expert_rows(task, order.inputs(task)) for task in problem.tasks]
    dim, dtype = merged[0].shape[1], compute_dtype(merged[0].dtype)
    variants, notes = auto_variants({FINAL: merged}) if variant == "auto" else ({FINAL: variant}, ())
    drawn = {"variant": variants[FINAL], "seed": seed, "dtype": dtype}
    modules = SurgeryModules(problem.tasks, dim, rank, **drawn).to(problem.device)
    set_means(modules, merged)

    tasks, repairs = slice(0, len(merged)), {FINAL: modules}
    recorded = capture_of("final", problem, optimizer, min(_LAUNCH, steps)) if capture else None
    descent = Descent([modules], [tasks], lr, optimizer, capturable=recorded is not None)
    losses = constant_losses(modules, tasks, [rows[:, None] for rows in merged], targets, order, steps=steps)
    options = {"capture": recorded, "read_every": problem.read_every}
    saving = {"resume": problem.resume, "on_step": problem.on_step}
    history = descend(descent, steps, losses, repairs, small=True, **options, **saving)
    record_active(modules, merged)
    return surgery_result("final", problem, repairs, history, notes=notes)


@torch.no_grad()
def set_means(modules: SurgeryModules, rows: Sequence[Tensor]) -> None:
    """Set the means of the centred variant to each task's mean feature; `rows`: (input, dim) per task."""
    if modules.mean is not None:
        modules.mean.copy_(torch.stack([task.double().mean(0, keepdim=True) for task in rows]))


@torch.no_grad()
def record_active(modules: SurgeryModules, rows: Sequence[Tensor]) -> None:
    """Record which units are active on all features of their task; `rows`: (input, dim) per task."""
    modules.clear()
    for task, features in enumerate(rows):
        for part in features.split(_CHUNK):
            modules(part[:, None].to(modules.down.device), slice(task, task + 1))
