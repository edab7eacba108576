"""Autocast's conversions of weights, which for frozen ones are made once and not in every forward pass."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

_CONVERTED = (nn.Linear, nn.modules.conv._ConvNd)
_FUSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # without gradients they pass weights on as they are


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, where it is on."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def autocast_parameters(module: nn.Module) -> set[int]:
    """The ids of the parameters that autocast converts before use: those of linear layers and convolutions alone."""
    inside, outside = set[int](), set[int]()
    for part in module.modules():
        own = {id(parameter) for parameter in part.parameters(recurse=False)}
        plain = type(part).__module__.startswith("torch.nn.") and isinstance(part, _CONVERTED)
        (inside if plain else outside).update(own)
    return inside - outside


@contextmanager
def frozen_weights_in(dtype: torch.dtype | None, module: nn.Module) -> Iterator[None]:
    """Inside the block, float32 weights that autocast would convert to `dtype` are in it; None changes nothing.

    Forward passes under autocast give the same bits. It takes half as much memory again. Left as they are: the weights
    of torch's own attention, which has a path of its own for passes without gradients.
    """
    fused = {id(weight) for part in module.modules() if isinstance(part, _FUSED) for weight in part.parameters()}
    converted = autocast_parameters(module) - fused if dtype else set()
    weights = [
        (parameter, parameter.data)
        for parameter in module.parameters()
        if id(parameter) in converted and parameter.dtype == torch.float32 and not parameter.requires_grad
    ]
    try:
        for parameter, whole in weights:
            parameter.data = whole.to(dtype)
        yield
    finally:
        for parameter, whole in weights:
            parameter.data = whole
