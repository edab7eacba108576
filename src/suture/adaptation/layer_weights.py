"""A layer's weight as matrices, and back."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from suture.adaptation.layer_calls import Layer


def matrix_of(layer: Layer, tensors: Mapping[str, Tensor]) -> Float[Tensor, "group out in"]:
    """A layer's weight as matrices in float64."""
    whole = tensors[layer.weight].detach()
    if layer.kind == "conv":
        return whole.double().reshape(layer.groups, len(whole) // layer.groups, -1)
    if layer.transposed:
        return whole.double().mT[None]
    return whole.reshape(-1, whole.shape[-1])[layer.start : layer.start + layer.size].double()[None]


def write_layer(layer: Layer, module: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Write a solution into the module's own parameters."""
    whole = module.get_parameter(layer.weight)
    with torch.no_grad():
        if layer.kind == "matrix" and not layer.transposed:
            whole.view(-1, whole.shape[-1])[layer.start : layer.start + layer.size] = weight[0].to(whole)
        else:
            whole.copy_((weight[0].mT if layer.transposed else weight.reshape(whole.shape)).to(whole))
        if layer.bias is not None and bias is not None:
            target = module.get_parameter(layer.bias).view(-1)
            target[layer.start : layer.start + len(bias)] = bias.to(target)
