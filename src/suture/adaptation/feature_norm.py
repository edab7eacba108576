"""Feature norms of the merged model, compared with its experts'.

With a linear head the entropy falls when all logits grow, so AdaMerging may lengthen the features instead of turning
them. A repair then starts far from the experts' features and can end below a repair of Task Arithmetic.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from suture.core.batches import Forward, Inputs, call, device_of, evaluation_mode, size, take, to_device
from suture.core.fabric import Team
from suture.core.sharding import Placed
from suture.errors import ConfigError, DataError

LIMIT = 1.5  #: the ratio from which a norm counts as drifted

Experts = Callable[[str], nn.Module] | Mapping[str, nn.Module] | nn.ModuleDict


class FeatureNorm(NamedTuple):
    """The mean Euclidean norms of a task's features: the merged model's and the expert's."""

    merged: float
    expert: float

    @property
    def ratio(self) -> float:
        """The merged model's norm divided by the expert's."""
        return self.merged / self.expert if self.expert else float("inf" if self.merged else 1)


def feature_norms(
    module: nn.Module,
    experts: Experts,
    inputs: Mapping[str, Inputs],
    *,
    forward: Forward = call,
    num_inputs: int = 256,
    batch_size: int = 64,
    fabric: Any = None,
) -> dict[str, FeatureNorm]:
    """Task → mean norms of the features of merged `module` and expert, over up to `num_inputs` inputs of each task.

    The inputs used are spread evenly over those given. `experts` is a mapping task → module, or a function that returns
    a task's module and may load all of them into one shared module, but not into `module`. All run in evaluation mode,
    without a graph, and are not changed. The processes of a `fabric` of the strategy fsdp have a part of each network.
    Raises `ConfigError` for a task without an expert and `DataError` for a task
    without inputs.

    >>> double, single = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    >>> _ = double.weight.data.copy_(2 * torch.eye(2)), single.weight.data.copy_(torch.eye(2))
    >>> feature_norms(double, {"mnist": single}, {"mnist": torch.tensor([[3.0, 4.0]])})
    {'mnist': FeatureNorm(merged=10.0, expert=5.0)}
    """
    if num_inputs < 1 or batch_size < 1:
        raise ConfigError(f"num_inputs={num_inputs}, batch_size={batch_size}: wanted 1 or more.")
    batches = {task: _batches(task, rows, num_inputs, batch_size) for task, rows in inputs.items()}
    team = Team(fabric)
    own = team.placed(module)
    merged = {task: _mean_norm(own, parts, forward) for task, parts in batches.items()}
    norms = {}
    for task, parts in batches.items():
        norms[task] = FeatureNorm(merged[task], _mean_norm(team.placed(_expert(experts, task)), parts, forward))
    return norms


def norm_drift(norms: Mapping[str, FeatureNorm], limit: float = LIMIT) -> tuple[str, ...]:
    """One warning if any features are at least `limit` times as long as the expert's, else none."""
    drifted = {task: norm for task, norm in norms.items() if norm.ratio >= limit}
    if not drifted:
        return ()
    task, worst = max(drifted.items(), key=_ratio)
    more = f" (and of {len(drifted) - 1} more)" if len(drifted) > 1 else ""
    return (
        f"Norm drift: the merged features of task {task!r}{more} have the mean norm {worst.merged:.3g}, the expert's "
        f"{worst.expert:.3g}. A repair that starts from them can end below one of Task Arithmetic. "
        "Remedy: repair a static merge, or adapt with objective=expert_feature_l1.",
    )


def _ratio(named: tuple[str, FeatureNorm]) -> float:
    return named[1].ratio


def _batches(task: str, inputs: Inputs, num_inputs: int, batch_size: int) -> list[Inputs]:
    count = size(inputs)
    if not count:
        raise DataError(f"Task {task!r} has no inputs to measure features on.")
    spread = torch.linspace(0, count - 1, min(num_inputs, count), dtype=torch.float64).round().long()
    return [take(inputs, index) for index in spread.split(batch_size)]


def _expert(experts: Experts, task: str) -> nn.Module:
    if not isinstance(experts, Mapping | nn.ModuleDict):
        return experts(task)
    if task not in experts:
        raise ConfigError(f"Task {task!r} has inputs but no expert (found: {', '.join(experts) or 'none'}).")
    return experts[task]


@torch.no_grad()
def _mean_norm(placed: Placed, batches: list[Inputs], forward: Forward) -> float:
    device, norms = device_of(placed.module), []
    with evaluation_mode(placed.module):
        for batch in batches:
            features = placed.run(partial(forward, placed.module, to_device(batch, device)))
            norms.append(features.double().flatten(1).norm(dim=1).cpu())
    return torch.cat(norms).mean().item()
