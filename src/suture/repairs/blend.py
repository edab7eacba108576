"""Expert blending: for each task, a learned weighted sum of the merged model's and all experts' features.

FusionBench's page on Representation Surgery describes it, but there is no public code. It runs every expert at
inference, and its optimum is the task's own expert alone, so it is an upper bound for repairs, not a cheap one.
"""

from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from suture.errors import DataError
from suture.merging.task_vectors import compute_dtype
from suture.repairs.blended_model import BlendModel
from suture.repairs.problem import Order, Problem
from suture.repairs.registry import repair_kind
from suture.repairs.results import RepairResult


@repair_kind(paper="https://tanganke.github.io/fusion_bench/algorithms/surgery/", whole=True)
def blend(
    problem: Problem,
    *,
    steps: Annotated[int, Ge(1)] = 1000,
    lr: Annotated[float, Gt(0)] = 1e-3,
    batch_size: Annotated[int, Ge(1)] = 16,
    seed: int = 0,
) -> RepairResult:
    """Fit ẑ_t = Σ α_i^(t) z_i to the expert's feature: mean |ẑ − z_expert|, by Adam, from α = 1 for the merged model.

    The merged model and all T experts encode each input once, T·(T + 1) encodings in all, and all of them run at
    inference.
    """
    order = Order(problem.inputs, steps, batch_size, seed, whole=problem.cache is not None)
    encoders = _encodings(problem, order)
    weights = torch.zeros(len(problem.tasks), 1 + len(problem.tasks), dtype=compute_dtype(encoders[0].dtype))
    weights[:, 0] = 1
    history = _fit(problem, nn.Parameter(weights), encoders, order, steps, lr)
    model = BlendModel(problem.module, problem.experts, weights, problem.tasks, forward=problem.forward)
    cost = f"A blend runs {1 + len(problem.tasks)} encoders for every input."
    return RepairResult(
        "blend",
        model.to(problem.device),
        history,
        warnings=(cost,),
        added_parameters=model.added_parameters,
        passes=problem.passes,
        encoders=1 + len(problem.tasks),
    )


def _encodings(problem: Problem, order: Order) -> list[Tensor]:
    """Per task, the encodings by the merged model and every expert: (input, encoder, dim). Experts are loaded once."""
    encodings = [[problem.merged_rows(task, order.inputs(task))] for task in problem.tasks]
    for expert in problem.tasks:
        module = problem.expert(expert)
        for rows, task in zip(encodings, problem.tasks, strict=True):
            rows.append(problem.rows("experts", module, task, order.inputs(task)))
    return [torch.stack(rows, dim=1) for rows in encodings]


def _fit(problem: Problem, weights: Tensor, encoders: list[Tensor], order: Order, steps: int, lr: float) -> Tensor:
    """Fit `weights` in place; returns the losses (step, task)."""
    adam, history = torch.optim.Adam([weights], lr=lr), []
    own = range(1, 1 + len(encoders))
    state = None if problem.resume is None else problem.resume.load()
    if state is not None:
        weights.data.copy_(state["weights"])
        adam.load_state_dict(state["adam"])
        history = list(state["losses"])
    for step in range(len(history), steps):
        z = torch.stack([rows[i] for rows, i in zip(encoders, order(step), strict=True)]).to(weights.dtype)
        target = torch.stack([task[:, expert] for task, expert in zip(z, own, strict=True)])
        losses = (torch.einsum("te,tbed->tbd", weights, z) - target).abs().mean((1, 2))
        if not losses.isfinite().all():
            raise DataError(
                f"The blend's loss is {losses.sum().item()} at step {step}. Remedy: check the inputs, or lower lr."
            )
        adam.zero_grad()
        losses.sum().backward()
        adam.step()
        history.append(losses.detach().double())
        if problem.resume is not None and (problem.resume.due() or step == steps - 1):
            losses_so_far = torch.stack(history)
            problem.resume.save({"weights": weights.detach(), "adam": adam.state_dict(), "losses": losses_so_far})
        if problem.on_step is not None:
            problem.on_step(step, history[-1], {})
    return torch.stack(history)
