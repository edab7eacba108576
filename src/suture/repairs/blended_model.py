"""The blended model: each task's feature is a weighted sum of the merged model's and all experts' features."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from suture.checkpoints import open_checkpoint, save_checkpoint
from suture.core.batches import Forward, call, device_of
from suture.errors import CheckpointError, ConfigError, check_known, unknown_name
from suture.repairs.network import Network


class BlendModel(nn.Module):
    """ẑ_t = Σ α_i^(t) z_i over the merged model's feature (i = 0) and the experts', in the order of the tasks.

    It runs 1 + T encoders for every input. `weights`: (task, 1 + task), α. `experts`: task → module, or a function that
    returns a task's module and may load all of them into one.

    >>> model = BlendModel(nn.Linear(3, 4), {"mnist": nn.Linear(3, 4)}, torch.tensor([[1.0, 0.0]]), ["mnist"])
    >>> model(torch.zeros(5, 3), "mnist").shape
    torch.Size([5, 4])
    """

    kind: ClassVar[str] = "blend"
    router: ClassVar[None] = None
    features_suffice: ClassVar[bool] = False
    weights: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        experts: Callable[[str], nn.Module] | Mapping[str, nn.Module] | nn.ModuleDict,
        weights: Float[Tensor, "task encoder"],
        tasks: Sequence[str],
        *,
        forward: Forward = call,
    ):
        super().__init__()
        self.tasks, self.forward_of = tuple(tasks), forward
        self.network = Network(backbone, forward)
        self.experts, self._load = None, None
        if isinstance(experts, Mapping | nn.ModuleDict):
            self.experts = nn.ModuleList([Network(experts[task], forward) for task in tasks])
        else:
            self._load = experts
        self.register_buffer("weights", weights)
        self.eval()

    @property
    def added_parameters(self) -> int:
        """The number of parameters that the blend adds, without the experts themselves."""
        return self.weights.numel()

    def forward(self, inputs: Any, task: str | Int[Tensor, " row"]) -> Float[Tensor, "row dim"]:
        """The blended features. `task`: one name for the batch, or a task index per row."""
        features = torch.stack([self.encode(inputs), *(self._expert(i)(inputs) for i in range(len(self.tasks)))])
        if isinstance(task, str) and task not in self.tasks:
            raise ConfigError(unknown_name("task", task, self.tasks))
        chosen = self.weights[self.tasks.index(task) if isinstance(task, str) else task]
        rows = chosen.to(features).expand(features.shape[1], -1)
        return torch.einsum("be,ebd->bd", rows, features)

    def encode(self, inputs: Any) -> Float[Tensor, "row dim"]:
        """The backbone's features, without repair."""
        return self.network(inputs)

    def for_task(self, task: str) -> "BlendedTask":
        """The model of one task as a plain module, inputs → features."""
        return BlendedTask(self, task)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write only the weights α, as safetensors."""
        save_checkpoint({"weights": self.weights}, path, {"kind": '"blend"', "tasks": json.dumps(self.tasks)})

    @classmethod
    def load(cls, path: str | os.PathLike[str], backbone: nn.Module, experts: Any, *, forward: Forward = call):
        """The model with saved weights, its backbone and experts; raises `CheckpointError` for any other file."""
        with open_checkpoint(path) as file:
            if file.metadata.get("kind") != '"blend"':
                raise CheckpointError(f"'{path}' holds no blend. Remedy: name a file that BlendModel.save wrote.")
            tasks, weights = json.loads(file.metadata["tasks"]), file["weights"].clone()
        return cls(backbone, experts, weights, tasks, forward=forward).to(device_of(backbone))

    def _expert(self, i: int) -> nn.Module:
        if self.experts is not None:
            return self.experts[i]
        assert self._load is not None
        return Network(self._load(self.tasks[i]), self.forward_of)


class BlendedTask(nn.Module):
    """A blend for one task: inputs → blended features (B, dim)."""

    def __init__(self, model: BlendModel, task: str):
        super().__init__()
        check_known("task", [task], model.tasks)
        self.model, self.task = model, task
        self.eval()

    def forward(self, inputs: Any) -> Tensor:
        return self.model(inputs, self.task)
