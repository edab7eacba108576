"""The tokens of the last block that reach the feature: those at which the feature has a gradient."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from suture.adaptation.blocks import Block, output_tensor, submodule
from suture.adaptation.layer_calls import Call, Layer, LayerCalls
from suture.core.batches import Forward, size
from suture.core.random import generator_for


def reads_first_token_only(module: nn.Module, forward: Forward, block: Block, inputs: Any) -> bool:
    """Whether the feature depends on the first token of a block's output alone."""
    outputs: list[Tensor] = []

    def keep(_: nn.Module, arguments: Any, output: Any) -> None:
        outputs.append(output_tensor(output, block.path))

    hook = submodule(module, block.path).register_forward_hook(keep)
    try:
        gradient = _gradients(module, forward, block, inputs, lambda: outputs)[0]
    finally:
        hook.remove()
    tokens = outputs[0].dim() == 3 and block.channel_axis in (-1, 2) and outputs[0].shape[1 - block.batch_axis] > 1
    return tokens and gradient is not None and not _reaches(gradient, block.batch_axis)


def full_layers(
    module: nn.Module, forward: Forward, block: Block, inputs: Any, names: Sequence[str] | None
) -> frozenset[Layer]:
    """The layers of a block whose results at other tokens reach the feature, or those that have a part in `names`.

    The input projection of `nn.MultiheadAttention`, which makes keys and values too, is always among the former.
    """
    calls: list[Call] = []

    def keep(call: Call) -> None:
        if call.layer.weight.startswith(f"{block.path}."):
            calls.append(call)

    watched = LayerCalls(module, keep)
    gradients = _gradients(module, forward, block, inputs, lambda: [call.output for call in calls], watched)
    if names is not None:
        return frozenset(call.layer for call in calls if set(names) & set(call.layer.weight.split(".")))
    full = set()
    for call, gradient in zip(calls, gradients, strict=True):
        if gradient is not None and gradient.dim() == 2:  # GPT-2 flattens its tokens
            gradient = gradient.unflatten(0, (size(inputs), -1))
        reached = gradient is not None and gradient.dim() == 3 and _reaches(gradient, block.batch_axis)
        if call.fused or call.layer.routed or reached:
            full.add(call.layer)
    return frozenset(full)


def _reaches(gradient: Tensor, batch_axis: int) -> bool:
    """Whether any token but the first has a gradient."""
    return bool((gradient.select(1 - batch_axis, 0).count_nonzero() < gradient.count_nonzero()).item())


def _gradients(
    module: nn.Module,
    forward: Forward,
    block: Block,
    inputs: Any,
    outputs: Callable[[], Sequence[Any]],
    inside: AbstractContextManager | None = None,
) -> Sequence[Tensor | None]:
    """The gradients of a random combination of the features at `outputs` of a block, None where there are none."""

    def begin(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return tuple(map(_leaf, args)), {name: _leaf(value) for name, value in kwargs.items()}

    hook = submodule(module, block.path).register_forward_pre_hook(begin, with_kwargs=True)
    try:
        with torch.enable_grad(), inside or nullcontext():
            features = forward(module, inputs).double()
        weights = torch.randn(features.shape, generator=generator_for(0, "read tokens"), dtype=torch.float64)
        total, found = (features * weights.to(features.device)).sum(), list(outputs())
        reached = [tensor for tensor in found if tensor.requires_grad] if total.requires_grad else []
        gradients = torch.autograd.grad(total, reached, allow_unused=True) if reached else ()
    finally:
        hook.remove()
    by_tensor = {id(tensor): gradient for tensor, gradient in zip(reached, gradients, strict=True)}
    return [by_tensor.get(id(tensor)) for tensor in found]


def _leaf(value: Any) -> Any:
    """Tokens with a gradient; anything else as it is."""
    tokens = isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 3
    return value.detach().clone().requires_grad_() if tokens else value
