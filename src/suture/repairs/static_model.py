"""A model repaired in its own weights: one network for all tasks, with nothing beside it."""

import os
from collections.abc import Sequence
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from suture.checkpoints import save_checkpoint
from suture.core.batches import Forward, call
from suture.core.unread import values_of
from suture.errors import check_known
from suture.repairs.network import Network


class StaticModel(nn.Module):
    """`module`, whose weights a repair has changed: inputs → features (B, dim), whatever the task.

    The module is not copied in memory and never changed. `tensors` are its weights under its own names.

    >>> import torch
    >>> StaticModel(nn.Linear(3, 4), ["mnist"], kind="calibrate")(torch.zeros(5, 3)).shape
    torch.Size([5, 4])
    """

    router: ClassVar[None] = None
    features_suffice: ClassVar[bool] = False
    added_parameters: ClassVar[int] = 0

    def __init__(self, module: nn.Module, tasks: Sequence[str], *, forward: Forward = call, kind: str):
        super().__init__()
        self.tasks, self.kind = tuple(tasks), kind
        self.network = Network(module, forward)
        self.eval()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The weights under the module's own names."""
        return {name: values_of(tensor) for name, tensor in self.network.module.state_dict(keep_vars=True).items()}

    def forward(self, inputs: Any, task: str | Tensor | None = None) -> Float[Tensor, "row dim"]:
        """The features; `task` changes nothing, but an unknown name raises `ConfigError`."""
        if isinstance(task, str):
            self.for_task(task)
        return self.network(inputs)

    def encode(self, inputs: Any) -> Float[Tensor, "row dim"]:
        """The features."""
        return self.network(inputs)

    def for_task(self, task: str) -> Network:
        """The model of one task as a plain module, inputs → features: the same for all."""
        check_known("task", [task], self.tasks)
        return self.network

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the weights as safetensors, for `load_state_dict` of the module or its library."""
        save_checkpoint(self.tensors, path, {"format": "pt"})
