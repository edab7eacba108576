"""Networks whose weights are sharded over the processes of a run, by PyTorch's FSDP2."""

import copy
import gc
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from suture.core.unread import values_of
from suture.errors import ConfigError


class Sharded(nn.Module):
    """A module on the meta device until `materialise`, each of whose parameters is split by rows over the processes.

    Every list of layers is gathered one layer at a time, tables of a vocabulary when they are called, and what else
    lies outside of lists with the whole. `call(function)` runs a function of the module with that part gathered, so
    that functions may read its parameters themselves. All processes must make the same calls. Scalars are not split.
    Parameters of the ids `learned` have gradients: the mean over processes.
    """

    def __init__(self, module: nn.Module, learned: Collection[int], device: torch.device):
        super().__init__()
        fully_shard = _fully_shard()
        from torch.distributed.device_mesh import init_device_mesh

        world = torch.distributed.get_world_size()
        mesh = init_device_mesh(device.type, (world,))
        self.module = _empty_copy(module, learned)
        paths = [*layer_paths(self.module), *table_paths(self.module)]
        layers = [self.module.get_submodule(path) for path in paths]
        scalars = {parameter for parameter in self.module.parameters() if parameter.ndim == 0}
        options = {"mesh": mesh, "reshard_after_forward": True, **({"ignored_params": scalars} if scalars else {})}
        for layer in layers:
            fully_shard(layer, **options)
        fully_shard(self, **options)
        self._layers: Sequence[Any] = layers
        self.device = device

    def forward(self, function: Callable[[], Any]) -> Any:
        result = function()
        view = isinstance(result, Tensor) and result._is_view()  # whose hook an operation in place would drop
        return result.clone() if view else result

    def call(self, function: Callable[[], Any]) -> Any:
        """`function()` with the parameters outside of the lists of layers gathered."""
        return self(function)

    def materialise(self) -> None:
        """Make room on the device for this process's parts, whose values are not set."""
        self._apply(lambda t: torch.empty_like(t, device=self.device) if t.is_meta else t.to(self.device))

    def renewed(self) -> None:
        """Forget what was gathered; to be called after parts were written."""
        parts: list[Any] = [*self._layers, self]
        for part in parts:
            part.reshard()


class Placed(NamedTuple):
    """A module where it can run: `run(function)` gives `function()`, inside which `module` may be called."""

    module: Any
    run: Callable[[Callable[[], Any]], Any]

    @classmethod
    def whole(cls, module: Any) -> "Placed":
        """A module as it is."""
        return cls(module, lambda function: function())

    @classmethod
    def in_parts(cls, module: nn.Module, device: torch.device) -> "Placed":
        """A frozen copy in evaluation mode whose weights are split over the processes, all of which make the same runs.

        Each process reads only its rows of the module's tensors, which may lie in mapped files or be unread.
        """
        gc.collect()  # FSDP's modules refer to themselves, so what was placed before is still in memory
        sharded = Sharded(module, (), device)
        sharded.materialise()
        own = module.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, part in sharded.module.state_dict(keep_vars=True).items():
                local(part).copy_(own_rows(values_of(own[name]), part))
        return cls(sharded.module.eval(), sharded.call)


def own_rows(whole: Tensor, part: Tensor) -> Tensor:
    """The rows of a tensor that this process has of it in `part`; all of them if that is not split."""
    if not is_sharded(part):
        return whole
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return whole.reshape(-1)[part_of(tuple(part.shape), rank, world)].view(local(part).shape)


def has_parts(module: nn.Module) -> bool:
    """Whether weights of a module are split over processes."""
    return any(map(is_sharded, module.parameters()))


def recompute_layers(module: nn.Module) -> None:
    """Let every layer keep only its inputs and run again in the backward pass, which costs a second forward pass."""
    for path in layer_paths(module):
        layer = module.get_submodule(path)
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def part_of(shape: Sequence[int], rank: int, world: int) -> slice:
    """The entries of the flattened tensor that process `rank` of `world` has: whole rows, as FSDP2 splits them.

    >>> [part_of((5, 2), rank, 3) for rank in range(3)]
    [slice(0, 4, None), slice(4, 8, None), slice(8, 10, None)]
    """
    if not shape:
        return slice(0, 1)
    width, rows = torch.Size(shape[1:]).numel(), -(-shape[0] // world)
    return slice(min(shape[0], rank * rows) * width, min(shape[0], (rank + 1) * rows) * width)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, in its memory; any other tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is split over processes."""
    return hasattr(tensor, "to_local")


def layer_paths(module: nn.Module) -> list[str]:
    """Paths of the layers that are gathered one at a time, inner ones first: the entries of the lists of layers.

    Without a `ModuleList` these are the entries of each `Sequential`. A layer that shares a parameter with the rest of
    the module is left out.
    """
    named = dict(module.named_modules())
    lists = [name for name, part in named.items() if isinstance(part, nn.ModuleList)]
    lists = lists or [name for name, part in named.items() if isinstance(part, nn.Sequential)]
    paths = [f"{name}.{child}".lstrip(".") for name in lists for child, _ in named[name].named_children()]
    return sorted(_independent(module, paths), key=lambda path: -path.count("."))


def table_paths(module: nn.Module) -> list[str]:
    """Paths of the input and output embeddings of transformers' models in a module.

    Left out are those that share their weights, as where both are one, and those inside of layers.
    """
    tables = []
    for part in module.modules():
        for getter in ("get_input_embeddings", "get_output_embeddings"):
            with suppress(NotImplementedError, AttributeError):
                tables.append(getattr(part, getter)())
    of_table = {id(table) for table in tables if isinstance(table, nn.Embedding | nn.Linear)}
    paths = [name for name, part in module.named_modules() if id(part) in of_table]
    inside = tuple(f"{path}." for path in layer_paths(module))
    return [path for path in _independent(module, paths) if path and not path.startswith(inside)]


def _independent(module: nn.Module, paths: Sequence[str]) -> list[str]:
    """The paths below which there are parameters, none of which is used elsewhere in the module."""
    uses: dict[int, set[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        uses.setdefault(id(parameter), set()).add(name)

    def is_own(path: str) -> bool:
        parameters = list(module.get_submodule(path).parameters())
        return bool(parameters) and all(name.startswith(f"{path}.") for p in parameters for name in uses[id(p)])

    return list(filter(is_own, paths))


def _empty_copy(module: nn.Module, learned: Collection[int]) -> nn.Module:
    """A copy with its own buffers, whose parameters are on the meta device."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=id(parameter) in learned)
    return copy.deepcopy(module, memo)


def _fully_shard() -> Any:
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        raise ConfigError(f"fabric.strategy=fsdp needs torch 2.6; found {torch.__version__}.") from None
    return fully_shard
