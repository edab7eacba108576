"""Models of `transformers` from a directory's configuration, and weights copied into them by today's names."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from suture.errors import CheckpointError, one_line
from suture.families.shared.pictures import quiet

Naming = Callable[[Any], Mapping[str, str]]  # names of a state → canonical name → stored name


def config_of(directory: Path) -> Any:
    """The configuration in a model's directory; raises `CheckpointError`."""
    with quiet():
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(directory, local_files_only=True)
        except Exception as error:  # the library has an exception class of its own for almost everything
            raise CheckpointError(f"'{directory}' has no usable config.json: {one_line(error)}") from error


def build(auto: str, config: Any, family: str, directory: Path, **changes: Any) -> Any:
    """A model of a configuration, float32, in evaluation mode; it takes nothing from torch's generator."""
    config = deepcopy(config)
    for key, value in changes.items():
        setattr(config, key, value)
    with quiet(), torch.random.fork_rng(devices=[]):
        import transformers

        try:
            return getattr(transformers, auto).from_config(config).float().eval().requires_grad_(False)
        except Exception as error:  # as above
            raise CheckpointError(f"'{directory}' holds no model for family={family}: {one_line(error)}") from error


@torch.no_grad()
def copy_into(module: nn.Module, state: Mapping[str, Tensor], naming: Naming) -> None:
    """Copy weights and statistics in, all checked before the first is written; raises `CheckpointError`.

    A tensor under several names in the module counts under the first. Tensors of whole numbers stay as they are.
    """
    found, label, own = naming(state), getattr(state, "label", "the model"), first_names(module)
    for name, tensor in own.items():
        if name not in found:
            raise CheckpointError(f"'{name}' is missing from '{label}'; wanted a model of the base's architecture.")
        if (shape := state[found[name]].shape) != tensor.shape:
            raise CheckpointError(f"'{name}' has shape {tuple(shape)}, not {tuple(tensor.shape)}, in '{label}'.")
    for name, tensor in own.items():
        tensor.copy_(state[found[name]])


def first_names(module: nn.Module) -> dict[str, Tensor]:
    """The floating-point tensors of a module's state, each under the first of its names."""
    state = module.state_dict(keep_vars=True)
    return {name: state[name] for name in dict.fromkeys(tied_names(module).values()) if state[name].is_floating_point()}


def tied_names(module: nn.Module) -> dict[str, str]:
    """Every name in a module's state → the first name of the same tensor."""
    seen: dict[int, str] = {}
    return {name: seen.setdefault(id(t), name) for name, t in module.state_dict(keep_vars=True).items()}
