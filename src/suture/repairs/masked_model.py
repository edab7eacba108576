"""The masked model: one network whose weights are switched to those of each task, by name, by row, or by a router."""

import copy
import json
import os
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from suture.checkpoints import Source, open_checkpoint
from suture.core.batches import Forward, call, device_of, take
from suture.errors import IncompatibleModels
from suture.merging.task_masks import TaskMasks
from suture.repairs.model import read_router, router_state
from suture.repairs.network import Network
from suture.repairs.router import Router, route


class MaskedModel(nn.Module):
    """`module` with the weights of `masks`: inputs → features (B, dim) of the chosen tasks.

    The module is copied twice and never changed: once with the average of all tasks' weights, whose features the
    `router` reads, and once with the weights of the task at hand. `switches` counts how often these were changed. One
    encoder runs for an input whose task is given, two for one whose task the router chooses; a batch with inputs of
    several tasks is encoded task by task.

    Raises `IncompatibleModels` for a module without the masks' tensors.

    >>> from suture.merging.masking import tall_masks
    >>> base, one, two = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(3, 4)
    >>> model = MaskedModel(base, tall_masks(base, {"one": one, "two": two}))
    >>> model(torch.zeros(5, 3), "one").shape
    torch.Size([5, 4])
    """

    kind: ClassVar[str] = "masks"
    features_suffice: ClassVar[bool] = False
    router: Router | None

    def __init__(self, module: nn.Module, masks: TaskMasks, *, forward: Forward = call, router: Router | None = None):
        super().__init__()
        self.masks, self.tasks, self.encoding = masks, masks.tasks, forward
        self.network = Network(_with_weights(module, masks, masks.average()), forward)
        self.worker = Network(_with_weights(module, masks, {}), forward)
        self.router, self.current, self.switches = router, "", 0
        self.eval()

    @property
    def added_parameters(self) -> int:
        """The numbers stored beside the pretrained model: the update and the scales, without the bits."""
        return self.masks.entries + len(self.tasks)

    def forward(self, inputs: Any, task: str | Int[Tensor, " row"] | None = None) -> Float[Tensor, "row dim"]:
        """The features. `task`: one name for the batch, a task index per row, or None for the router.

        Raises `ConfigError` for an unknown task, and without a router for None.
        """
        if isinstance(task, str):
            return self._switched(task)(inputs)
        which = self.route(self.encode(inputs)) if task is None else task
        features: dict[int, Tensor] = {}
        for index in which.unique().tolist():
            rows = (which == index).nonzero()[:, 0]
            features |= dict(zip(rows.tolist(), self._switched(self.tasks[index])(take(inputs, rows)), strict=True))
        return torch.stack([features[row] for row in range(len(which))])

    def encode(self, inputs: Any) -> Float[Tensor, "row dim"]:
        """The features of the average of all tasks' weights."""
        return self.network(inputs)

    def route(self, features: Float[Tensor, "row dim"]) -> Int[Tensor, " row"]:
        """The task index that the router chooses for each row; raises `ConfigError` without a router."""
        return route(self.router, features)

    def for_task(self, task: str) -> Network:
        """The model of one task as a plain module with weights of its own, inputs → features."""
        return Network(_with_weights(self.network.module, self.masks, self.masks.for_task(task)), self.encoding)

    def save(
        self, path: str | os.PathLike[str], names: Mapping[str, str] | None = None, base: Source | None = None
    ) -> None:
        """Write the masks (and the router) without the pretrained model, as safetensors.

        `names`: name here → name in the pretrained model `base`, where these differ.
        """
        tensors, facts = router_state(self.router)
        masks = self.masks if names is None or base is None else self.masks.renamed(names, base)
        masks.save(path, beside=tensors, metadata=facts)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], module: nn.Module, base: Source | None = None, *, forward: Forward = call
    ) -> "MaskedModel":
        """The model of a file of masks, with the module that they fit; `base` is by default the module's own weights.

        Raises `CheckpointError` and `IncompatibleModels` as `TaskMasks.load` does.
        """
        masks = TaskMasks.load(path, module if base is None else base)
        with open_checkpoint(path) as file:
            router = None
            if "router" in file.metadata:
                router = read_router(file, _name(file.metadata["router"]), len(masks.tasks))
        return cls(module, masks, forward=forward, router=router).to(device_of(module))

    def _switched(self, task: str) -> Network:
        if task != self.current:
            _copy_into(self.worker.module, self.masks, self.masks.for_task(task))
            self.current, self.switches = task, self.switches + 1
        return self.worker


def _name(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _with_weights(module: nn.Module, masks: TaskMasks, weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the module, in memory too, with some of its tensors replaced."""
    own = copy.deepcopy(module)
    _copy_into(own, masks, weights)
    return own


@torch.no_grad()
def _copy_into(module: nn.Module, masks: TaskMasks, weights: Mapping[str, Tensor]) -> None:
    state = module.state_dict()
    for name, update in masks.update.items():
        if name not in state or state[name].shape != update.shape:
            found = f"has shape {tuple(state[name].shape)}" if name in state else "is missing"
            raise IncompatibleModels(
                f"'{name}' {found} in the module ({type(module).__name__}), and shape {tuple(update.shape)} in the "
                "masks. Remedy: give the module that the masks were made for."
            )
        if name in weights:
            state[name].copy_(weights[name])
