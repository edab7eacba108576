"""The processes that adapt together, through Lightning Fabric; a team of one without it."""

import io
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from suture.core.fabric import PRECISIONS
from suture.errors import ConfigError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

T = TypeVar("T")


class Team:
    """Device, precision and sums over processes. `rank` is this process, of `world`."""

    def __init__(self, fabric: "Fabric | None" = None):
        self.fabric = fabric
        self.rank, self.world = (fabric.global_rank, fabric.world_size) if fabric else (0, 1)
        self.device = fabric.device if fabric else None
        found = fabric.strategy.precision.precision if fabric else PRECISIONS[0]
        if found not in PRECISIONS:
            raise ConfigError(f"fabric.precision={found}: wanted one of {', '.join(PRECISIONS)}.")

    def autocast(self) -> AbstractContextManager:
        """The context of the forward and backward passes."""
        return self.fabric.autocast() if self.fabric else nullcontext()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, on the CPU."""
        if self.fabric is None or self.world == 1:
            return tensor
        total = self.fabric.all_reduce(tensor.to(self.fabric.device), reduce_op="sum")
        assert isinstance(total, Tensor)
        return total.to("cpu", torch.float64)


def launch(fabric: "Fabric", function: "Callable[[Fabric], T]") -> T:
    """Run `function(fabric)` in every process of Fabric's strategy, and give what process 0 gives.

    Strategies fork processes for this (`ddp_fork`), or start the whole command once for each (`ddp`, torchrun, Slurm).
    Of the latter, all but process 0 end here: what follows is one process's work.
    """
    if fabric.world_size == 1 or not _forks(fabric):
        fabric.launch()
        result = function(fabric)
        if fabric.global_rank > 0:
            raise SystemExit(0)
        return result
    if torch.cuda.is_initialized():
        remedy = "Remedy: fabric.strategy=ddp, which starts the command once for each process, or fabric.devices=1."
        raise ConfigError(f"fabric: this process has used the GPU already and cannot be forked. {remedy}")
    return torch.load(io.BytesIO(fabric.launch(_packed, function)), weights_only=False)  # type: ignore[arg-type]


def _forks(fabric: "Fabric") -> bool:
    launcher = fabric.strategy.launcher
    return launcher is not None and launcher.is_interactive_compatible


def _packed(fabric: "Fabric", function: "Callable[[Fabric], T]") -> bytes:
    """The result as bytes: tensors would be handed over by a process that is gone when they are read."""
    buffer = io.BytesIO()
    torch.save(function(fabric), buffer)
    return buffer.getvalue()
