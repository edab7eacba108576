"""Routers choose an input's task from the merged model's feature, for use without a task's name.

They are fitted on the same inputs as the repair, which have no labels but belong to a known task.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import normalize, one_hot

from suture.core.random import generator_for
from suture.errors import ConfigError, DataError

_ROUNDS = 25


def route(router: nn.Module | None, features: Float[Tensor, "row dim"]) -> Int[Tensor, " row"]:
    """The task index that a model's router chooses for each row; raises `ConfigError` without a router."""
    if router is None:
        raise ConfigError("No task was given and the model has no router. Remedy: model(inputs, task), or a router.")
    return router(features)


class CentroidRouter(nn.Module):
    """The task of the nearest centroid, by the cosine. centroids: (centroid, dim); owner: (centroid,) task indices."""

    name: ClassVar[str] = "centroids"

    centroids: Tensor
    owner: Tensor

    def __init__(self, centroids: Float[Tensor, "centroid dim"], owner: Int[Tensor, " centroid"]):
        super().__init__()
        self.register_buffer("centroids", centroids)
        self.register_buffer("owner", owner)

    def forward(self, features: Float[Tensor, "row dim"]) -> Int[Tensor, " row"]:
        """The task index of each row."""
        return self.owner[_nearest(normalize(features, dim=-1), self.centroids)]

    def fits(self, tasks: int) -> bool:
        """Whether shapes and owners are those of a router for so many tasks."""
        shape, owner = self.centroids.shape, self.owner
        whole = len(shape) == 2 and owner.shape == shape[:1] and owner.dtype == torch.int64 and len(owner) > 0
        return whole and bool(((owner >= 0) & (owner < tasks)).all())


class LinearRouter(nn.Module):
    """The task of the largest output of a linear probe. weight: (task, dim); bias: (task,)."""

    name: ClassVar[str] = "linear"

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Float[Tensor, "task dim"], bias: Float[Tensor, " task"]):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, features: Float[Tensor, "row dim"]) -> Int[Tensor, " row"]:
        """The task index of each row."""
        return (normalize(features, dim=-1) @ self.weight.T + self.bias).argmax(-1)

    def fits(self, tasks: int) -> bool:
        """Whether the shapes are those of a router for so many tasks."""
        return self.weight.ndim == 2 and len(self.weight) == tasks and self.bias.shape == (tasks,)


Router = CentroidRouter | LinearRouter
ROUTERS: dict[str, type[Router]] = {"centroids": CentroidRouter, "linear": LinearRouter}


def fit_router(
    features: Mapping[str, Float[Tensor, "input dim"]],
    *,
    kind: Literal["centroids", "linear"] = "centroids",
    centroids: Annotated[int, Ge(1)] = 1,
    ridge: Annotated[float, Gt(0)] = 1e-3,
    seed: int = 0,
) -> Router:
    """A router fitted to the merged model's `features` of each task; only their directions count.

    `kind="centroids"` takes the mean direction of each task, or this number of seeded k-means centroids.
    `kind="linear"` is ridge regression onto the task's indicator, in closed form, with equal weight for each task;
    `ridge` is relative to the features' mean variance. Task indices follow the order of `features`.

    >>> router = fit_router({"a": torch.eye(2)[:1], "b": torch.eye(2)[1:]})
    >>> router(torch.tensor([[3.0, 1.0], [0.0, 2.0]]))
    tensor([0, 1])
    """
    directions = {task: normalize(rows.detach().double(), dim=-1) for task, rows in features.items()}
    for task, rows in directions.items():
        if len(rows) == 0:
            raise DataError(f"Task {task!r} has no features to fit a router on.")
    dtype = next(iter(features.values())).dtype
    if kind == "linear":
        weight, bias = _ridge(list(directions.values()), ridge)
        return LinearRouter(weight.to(dtype), bias.to(dtype))
    by_task = [_k_means(rows, centroids, seed, task) for task, rows in directions.items()]
    owner = torch.cat([torch.full((len(rows),), i) for i, rows in enumerate(by_task)])
    return CentroidRouter(torch.cat(by_task).to(dtype), owner)


def routing_accuracy(router: Router, features: Mapping[str, Float[Tensor, "input dim"]]) -> dict[str, float]:
    """Per task, the share of its inputs that the router sends to it; tasks in the order of `fit_router`."""
    return {task: (router(rows) == i).double().mean().item() for i, (task, rows) in enumerate(features.items())}


def _nearest(directions: Tensor, centroids: Tensor) -> Tensor:
    return (directions @ centroids.T).argmax(-1)


def _k_means(directions: Tensor, count: int, seed: int, task: str) -> Float[Tensor, "centroid dim"]:
    """Spherical k-means from seeded inputs; a centroid that loses all its inputs does not move."""
    count = min(count, len(directions))
    if count == 1:
        return normalize(directions.mean(0, keepdim=True), dim=-1)
    chosen = torch.randperm(len(directions), generator=generator_for(seed, f"router/{task}"))[:count]
    centroids = directions[chosen].clone()
    for _ in range(_ROUNDS):
        members = one_hot(_nearest(directions, centroids), count).to(directions)
        sums = members.T @ directions
        moved = torch.where(members.sum(0)[:, None] > 0, normalize(sums, dim=-1), centroids)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids


def _ridge(groups: list[Tensor], ridge: float) -> tuple[Float[Tensor, "task dim"], Float[Tensor, " task"]]:
    rows, counts = torch.cat(groups), torch.tensor([len(group) for group in groups])
    owner = torch.repeat_interleave(torch.arange(len(groups)), counts)
    weights = (1 / counts.double()).repeat_interleave(counts)[:, None] / len(groups)
    goal = one_hot(owner, len(groups)).double()
    mean, goal_mean = (weights * rows).sum(0), (weights * goal).sum(0)
    centred = rows - mean
    covariance = centred.T @ (weights * centred)
    scale = covariance.diagonal().mean().clamp_min(1e-12)
    damped = covariance + ridge * scale * torch.eye(rows.shape[1], dtype=rows.dtype)
    weight = torch.linalg.solve(damped, centred.T @ (weights * (goal - goal_mean))).T
    return weight, goal_mean - weight @ mean
