"""The weights that a distillation trains: all of a network's, those of its normalisation layers, or LoRA factors."""

import copy
import math
from collections.abc import Container, Iterator, Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from suture.core.random import generator_for
from suture.errors import ConfigError
from suture.merging.overflow import refuse_overflow
from suture.merging.task_vectors import compute_dtype

Parameters = Literal["all", "norms", "lora"]


def master_copy(module: nn.Module) -> nn.Module:
    """A copy with memory of its own, in float32, or float64 where the module is."""
    master = copy.deepcopy(module)
    for tensor in (*master.parameters(), *master.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(compute_dtype(tensor.dtype))
    return master


def trained_weights(
    module: nn.Module, which: Parameters, rank: int, seed: int, shared: Container[str] | None = None
) -> list[nn.Parameter]:
    """Choose the leaves to train and let only them require a gradient.

    `shared`: the names that may change, by default all; a tied weight may if one of its names may. "norms" are the
    weights and biases of the layers whose class has "norm" in its name. "lora" adds low-rank factors to the matrices of
    Linear layers and of MultiheadAttention, but not to tied ones, until `fold`. Raises `ConfigError` if there are none.
    """
    module.requires_grad_(False)
    names = _names(module)
    free = {
        p for p, own in names.items() if p.is_floating_point() and (shared is None or any(n in shared for n in own))
    }
    if which == "lora":
        targets = [(part, name, p) for part, name, p in _matrices(module) if p in free and len(names[p]) == 1]
        chosen = [leaf for part, name, p in targets for leaf in _factors(part, name, names[p][0], rank, seed)]
    else:
        parts = module.modules() if which == "all" else filter(_is_norm, module.modules())
        chosen = [p for part in parts for p in part.parameters(recurse=False) if p in free]
    if not chosen:
        kind = type(module).__name__
        raise ConfigError(f"parameters={which}: the module ({kind}) has no such weights. Remedy: parameters=all.")
    chosen = list(dict.fromkeys(chosen))
    for parameter in chosen:
        parameter.requires_grad_()
    return chosen


def fold(module: nn.Module) -> None:
    """Add the low-rank products to the matrices that they belong to, and remove the factors."""
    for part in list(module.modules()):
        own = part.parametrizations if parametrize.is_parametrized(part) else {}
        assert isinstance(own, Mapping | nn.ModuleDict)
        for name in [name for name, steps in own.items() if isinstance(next(steps.children()), LowRank)]:
            parametrize.remove_parametrizations(part, name)


@torch.no_grad()
def with_weights_of(module: nn.Module, trained: nn.Module) -> nn.Module:
    """A copy of a module with trained values in its own dtypes; raises `IncompatibleModels` for values out of range."""
    result, state = copy.deepcopy(module), trained.state_dict()
    for name, tensor in result.state_dict().items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            tensor.copy_(state[name])
            refuse_overflow(name, state[name], tensor, remedy="lower lr, or a module of a wider dtype")
    return result


class LowRank(nn.Module):
    """W + U·D with U (out, rank), zero at the start, and D (rank, in), as in LoRA. https://arxiv.org/abs/2106.09685"""

    def __init__(self, down: Float[Tensor, "rank in"], out: int):
        super().__init__()
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(down.new_zeros(out, len(down)))

    def forward(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        with torch.autocast(weight.device.type, enabled=False):  # the sum is as exact as the one that is saved
            return weight + self.up @ self.down


def _names(module: nn.Module) -> dict[nn.Parameter, list[str]]:
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names


def _is_norm(part: nn.Module) -> bool:
    return "norm" in type(part).__name__.lower()


def _matrices(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """The module, name and parameter of every matrix of a Linear or MultiheadAttention."""
    for part in list(module.modules()):
        kinds = ("weight",) if isinstance(part, nn.Linear) else ()
        if isinstance(part, nn.MultiheadAttention):
            kinds = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        for name in kinds:
            if isinstance(weight := getattr(part, name), nn.Parameter):
                yield part, name, weight


def _factors(part: nn.Module, name: str, path: str, rank: int, seed: int) -> list[nn.Parameter]:
    """The factors of one matrix; D is uniform in ±1/√in and depends only on seed and name."""
    weight = getattr(part, name)
    out, width = weight.shape
    rank, bound = min(rank, out, width), 1 / math.sqrt(width)
    drawn = torch.empty(rank, width, dtype=torch.float64).uniform_(
        -bound, bound, generator=generator_for(seed, f"lora/{path}")
    )
    low_rank = LowRank(drawn.to(weight), out)
    parametrize.register_parametrization(part, name, low_rank)
    return [low_rank.down, low_rank.up]
