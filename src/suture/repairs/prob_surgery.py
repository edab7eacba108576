"""ProbSurgery: a module per task on the final feature that models the correction as a distribution.

https://openreview.net/forum?id=a02CH43z1G. With h = ReLU(D·z) the correction is drawn from a Gaussian of mean M·h and
log variance L·h while the modules are trained; at inference it is the mean, so what is left is a surgery module.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt
from jaxtyping import Float
from torch import Tensor, nn

from suture.core.random import generator_for
from suture.merging.task_vectors import compute_dtype
from suture.repairs.final import record_active
from suture.repairs.fitting import Descent, Losses, descend
from suture.repairs.modules import SurgeryModules
from suture.repairs.network import FINAL
from suture.repairs.problem import Order, Problem
from suture.repairs.registry import repair_kind
from suture.repairs.results import RepairResult, surgery_result


@repair_kind(paper="https://openreview.net/forum?id=a02CH43z1G", scored_while_fitting=True)
def prob_surgery(
    problem: Problem,
    *,
    rank: Annotated[int, Ge(1)] = 128,
    steps: Annotated[int, Ge(1)] = 5000,
    lr: Annotated[float, Gt(0)] = 1e-3,
    batch_size: Annotated[int, Ge(1)] = 16,
    divergence: Annotated[float, Ge(0)] = 1e-4,
    seed: int = 0,
) -> RepairResult:
    """Fit ẑ = z − (M·h + ε·exp(L·h/2)), h = ReLU(D·z), ε normal, to the expert's feature; at inference ẑ = z − M·h.

    The loss is mean |ẑ − z_expert| + `divergence` · KL, the divergence from the standard normal distribution, summed
    over dim and averaged over the batch; each task has its own Adam. At the start the noise has variance 1 whatever the
    scale of the features: with short ones it takes more steps until the variance has fallen.
    """
    order = Order(problem.inputs, steps, batch_size, seed, whole=problem.cache is not None)
    merged = [problem.merged_rows(task, order.inputs(task)) for task in problem.tasks]
    targets = [problem.expert_rows(task, order.inputs(task)) for task in problem.tasks]
    options: dict[str, Any] = {"seed": seed, "dtype": compute_dtype(merged[0].dtype)}
    modules = GaussianModules(problem.tasks, merged[0].shape[1], rank, **options).to(problem.device)

    def noise(step: int, task: int, shape: Sequence[int]) -> Tensor:
        generator = generator_for(seed, f"prob_surgery/{problem.tasks[task]}/{step}")
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    losses = gaussian_losses(modules, merged, targets, order, noise, divergence)
    descent = Descent([modules], [slice(0, len(merged))], lr, "adam")
    saving = {"resume": problem.resume, "on_step": problem.on_step, "read_every": problem.read_every}
    history = descend(descent, steps, losses, {FINAL: modules}, small=True, **saving)
    final = modules.without_variance()
    record_active(final, merged)
    return surgery_result("prob_surgery", problem, {FINAL: final}, history)


class GaussianModules(SurgeryModules):
    """Surgery modules with `log_variance` (task, dim, rank), L, beside `up`, which is M; both are zero at the start."""

    def __init__(self, tasks: Sequence[str], dim: int, rank: int, **options: Any):
        super().__init__(tasks, dim, rank, **options)
        self.log_variance = nn.Parameter(torch.zeros_like(self.up))

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that a fit trains."""
        return [*super().trained, self.log_variance]

    def without_variance(self) -> SurgeryModules:
        """The modules at inference."""
        tasks, dim, rank = self.up.shape
        plain = SurgeryModules([""] * tasks, dim, rank, dtype=self.up.dtype).to(self.up.device)
        plain.load_state_dict({name: tensor for name, tensor in self.state_dict().items() if name != "log_variance"})
        return plain


def gaussian_losses(
    modules: GaussianModules,
    rows: Sequence[Float[Tensor, "_ dim"]],
    targets: Sequence[Float[Tensor, "_ dim"]],
    batches: Any,
    noise: Any,
    divergence: float,
) -> Losses:
    """The losses of all tasks at a step; `noise(step, task, shape)` is drawn from a standard normal distribution."""
    device, dtype = modules.down.device, modules.down.dtype

    def losses(step: int, which: slice) -> Tensor:
        tasks, indices = range(*which.indices(len(rows))), batches(step)
        z, goal = (torch.stack([part[t][indices[t]] for t in tasks]).to(device, dtype) for part in (rows, targets))
        hidden = (z @ modules.down[which].mT).relu()
        mean, log = hidden @ modules.up[which].mT, hidden @ modules.log_variance[which].mT
        drawn = torch.stack([noise(step, t, z.shape[1:]) for t in tasks]).to(device, dtype)
        distance = (z - (mean + drawn * (log / 2).exp()) - goal).abs().mean((1, 2))
        return distance + divergence * (mean.square() + log.exp() - 1 - log).sum(2).mean(1) / 2

    return losses
