"""An affine map for each task from the merged model's final feature to its expert's, in closed form.

Merged model and experts encode each input once; then each map is a ridge regression in float64. Nothing is trained.
Affine maps between two networks' features: https://arxiv.org/abs/1411.5908.
"""

from typing import Annotated, NamedTuple

import torch
from annotated_types import Gt
from jaxtyping import Float
from torch import Tensor

from suture.core.batches import device_of
from suture.core.random import generator_for
from suture.errors import DataError
from suture.merging.task_vectors import compute_dtype
from suture.repairs.affine_maps import AffineMaps
from suture.repairs.model import SurgeryModel
from suture.repairs.network import FINAL
from suture.repairs.problem import Problem
from suture.repairs.registry import repair_kind
from suture.repairs.results import RepairResult

GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
_HELD_OUT = 5  # one input of so many


@repair_kind(paper="https://arxiv.org/abs/1411.5908")
def affine(problem: Problem, *, ridge: Annotated[float, Gt(0)] | None = None, seed: int = 0) -> RepairResult:
    """Fit ẑ = A z + c to the expert's feature by least squares, with the penalty λ‖A − I‖².

    λ is `ridge` times the mean eigenvalue of the features' centred Gram matrix (its trace / dim). By default each task
    takes the power of ten from 0.0001 to 10 with the smallest squared error on a fifth of its inputs, held out, and is
    then fitted on all of them; the result says which. Features that do not vary, such as those of a single input, are
    only shifted: A = I. Only the final feature is changed, so A and c can be folded into a linear head; see
    `AffineMaps.fold_into_head`.
    """
    fits, chosen = [], {}
    for task, inputs in problem.inputs.items():
        z, goal = problem.merged_rows(task, inputs), problem.expert_rows(task, inputs)
        if not (z.isfinite().all() and goal.isfinite().all()):
            raise DataError(f"Task {task!r}: some features are not finite. Remedy: check the inputs and the models.")
        dtype = compute_dtype(z.dtype)
        chosen[task] = ridge or _best_ridge(z.double(), goal.double(), seed, task)
        fits.append([tensor.to(dtype) for tensor in _Fit.of(z.double(), goal.double()).solve(chosen[task])])
    maps = AffineMaps(*(torch.stack(tensors) for tensors in zip(*fits, strict=True))).to(device_of(problem.module))
    model = SurgeryModel(problem.module, {FINAL: maps}, problem.tasks, forward=problem.forward, kind="affine")
    said = ", ".join(f"{task} {value:g}" for task, value in chosen.items())
    notes = () if ridge else (f"ridge, by the error on held-out inputs: {said}.",)
    return RepairResult(
        "affine",
        model,
        torch.zeros(0, len(problem.tasks)),
        warnings=notes,
        added_parameters=model.added_parameters,
        passes=problem.passes,
    )


class _Fit(NamedTuple):
    """The moments of features z and residuals y − z, from which the map for any ridge follows.

    `values`, `vectors`: of the centred Gram matrix; `cross`: Σ z (y − z)ᵀ, centred; `mean`, `shift`: of z and y − z.
    """

    values: Float[Tensor, " dim"]
    vectors: Float[Tensor, "dim dim"]
    cross: Float[Tensor, "dim dim"]
    mean: Float[Tensor, " dim"]
    shift: Float[Tensor, " dim"]

    @classmethod
    def of(cls, z: Float[Tensor, "input dim"], goal: Float[Tensor, "input dim"]) -> "_Fit":
        mean, shift = z.mean(0), (goal - z).mean(0)
        centred, residual = z - mean, goal - z - shift
        values, vectors = torch.linalg.eigh(centred.T @ centred)
        return cls(values.clamp_min(0), vectors, centred.T @ residual, mean, shift)

    def solve(self, ridge: float) -> tuple[Float[Tensor, "dim dim"], Float[Tensor, " dim"]]:
        """A and c, with A − I = ((G + λI)⁻¹ Σ z (y − z)ᵀ)ᵀ and c such that means are mapped to means."""
        damped = self.values + ridge * self.values.mean()
        inverse = torch.where(damped > 0, 1 / damped, 0)  # all are 0 where the features do not vary
        change = (self.vectors @ (inverse[:, None] * (self.vectors.T @ self.cross))).T
        return torch.eye(len(change), dtype=change.dtype) + change, self.shift - change @ self.mean


def _best_ridge(z: Tensor, goal: Tensor, seed: int, task: str) -> float:
    """The value of the grid with the smallest error on a fifth of the inputs; the largest if there is no fifth."""
    order = torch.randperm(len(z), generator=generator_for(seed, f"{task}/held out"))
    held, rest = order[: len(z) // _HELD_OUT], order[len(z) // _HELD_OUT :]
    if len(held) == 0:
        return GRID[-1]
    fit, errors = _Fit.of(z[rest], goal[rest]), {}
    for ridge in reversed(GRID):
        a, c = fit.solve(ridge)
        errors[ridge] = (z[held] @ a.T + c - goal[held]).square().mean().item()
    return min(errors, key=errors.__getitem__)
