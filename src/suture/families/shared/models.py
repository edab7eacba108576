"""Models of `transformers` built from a directory's configuration, and weights copied into them by current names."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from suture.checkpoints import Checkpoint
from suture.errors import CheckpointError, one_line
from suture.families.shared.pictures import quiet

Naming = Callable[[Any], Mapping[str, str]]  # names of a state → canonical name → stored name


def config_of(directory: Path) -> Any:
    """The configuration in a model's directory; raises `CheckpointError` if it cannot be read."""
    with quiet():
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(directory, local_files_only=True)
        except Exception as error:  # the library raises a different class for almost every problem
            raise CheckpointError(f"'{directory}' has no usable config.json: {one_line(error)}") from error


def build(auto: str, config: Any, family: str, directory: Path, **changes: Any) -> Any:
    """A model of a configuration, float32 and in evaluation mode; torch's generator is left unchanged."""
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
    """Copy in weights and statistics after checking all of them; raises `CheckpointError` if they do not fit.

    Tied tensors of the module count under their first name. Integer tensors are not copied.
    """
    stored, targets = naming(state), first_names(module)
    check_fit(targets, stored, state)
    for name, tensor in targets.items():
        tensor.copy_(state[stored[name]])


def check_fit(targets: Mapping[str, Tensor], stored: Mapping[str, str], state: Mapping[str, Tensor]) -> None:
    """Raise `CheckpointError` for the first of a module's tensors that a state lacks, or has in another shape.

    Of a checkpoint only headers are read.
    """
    label = getattr(state, "label", "the model")
    for name, tensor in targets.items():
        if name not in stored:
            raise CheckpointError(f"'{name}' is missing from '{label}'; wanted a model of the base's architecture.")
        key = stored[name]
        shape = state.specs[key].shape if isinstance(state, Checkpoint) else state[key].shape
        if tuple(shape) != tuple(tensor.shape):
            found = f"'{name}' has shape {tuple(shape)} in '{label}'"
            raise CheckpointError(f"{found}, but {tuple(tensor.shape)} in the network.")


def first_names(module: nn.Module) -> dict[str, Tensor]:
    """The floating-point tensors of a module's state, each under the first of its names."""
    state = module.state_dict(keep_vars=True)
    return {name: state[name] for name in dict.fromkeys(tied_names(module).values()) if state[name].is_floating_point()}


def tied_names(module: nn.Module) -> dict[str, str]:
    """Every name in a module's state → the first name of the same tensor."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(t), name) for name, t in module.state_dict(keep_vars=True).items()}


def without_memory(config: Any, make: Callable[[], Any]) -> Any:
    """The model that `make()` builds on the meta device, without memory for weights.

    `config` is read before, so that tensors made while reading it are not on the meta device too.
    """
    assert config is not None
    with torch.device("meta"):
        return make()
