"""Which tokens of the last block reach the feature, found by changing the others."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from suture.adaptation.blocks import Block, output_tensor, submodule
from suture.adaptation.layer_calls import Call, Layer, LayerCalls
from suture.core.batches import Forward

_TINY = 1e-4


def reads_first_token_only(module: nn.Module, forward: Forward, block: Block, inputs: Any) -> bool:
    """Whether the feature depends on the first token of a block's output alone."""
    several = False

    def change(_: nn.Module, arguments: Any, output: Any) -> Any:
        nonlocal several
        tensor = output_tensor(output, block.path)
        if tensor.dim() != 3 or block.channel_axis not in (-1, 2) or tensor.shape[1 - block.batch_axis] < 2:
            return None
        several = True
        changed = _others_changed(tensor, block.batch_axis)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    before = _features(module, forward, inputs)
    hook = submodule(module, block.path).register_forward_hook(change)
    try:
        after = _features(module, forward, inputs)
    finally:
        hook.remove()
    return several and _equal(before, after)


def full_layers(
    module: nn.Module, forward: Forward, block: Block, inputs: Any, names: Sequence[str] | None
) -> frozenset[Layer]:
    """The layers of a block whose results at other tokens reach the feature, or those that have a part in `names`."""
    seen: dict[Layer, bool] = {}

    def note(call: Call) -> None:
        seen.setdefault(call.layer, call.fused)

    prefix = f"{block.path}."
    with LayerCalls(module, note):
        before = _features(module, forward, inputs)
    layers = [layer for layer in seen if layer.weight.startswith(prefix)]
    if names is not None:
        return frozenset(layer for layer in layers if set(names) & set(layer.weight.split(".")))
    return frozenset(
        layer for layer in layers if seen[layer] or _matters(module, forward, block, inputs, layer, before)
    )


def _matters(module: nn.Module, forward: Forward, block: Block, inputs: Any, layer: Layer, before: Tensor) -> bool:
    """Whether the feature changes with a layer's results at all tokens but the first."""

    def change(call: Call) -> Tensor | None:
        if call.layer != layer or call.output is None:
            return None
        flat = call.output.dim() == 2
        tokens = call.output.unflatten(0, (len(before), -1)) if flat else call.output
        if tokens.dim() != 3 or tokens.shape[1 - block.batch_axis] < 2:
            return None
        changed = _others_changed(tokens, block.batch_axis)
        return changed.flatten(0, 1) if flat else changed

    with LayerCalls(module, change):
        return not _equal(before, _features(module, forward, inputs))


def _others_changed(tokens: Tensor, batch_axis: int) -> Tensor:
    """Tokens with other values at all positions but the first."""
    first, others = tokens.split([1, tokens.shape[1 - batch_axis] - 1], dim=1 - batch_axis)
    return torch.cat([first, others.flip(-1) + others.std() + 1], dim=1 - batch_axis)


@torch.no_grad()
def _features(module: nn.Module, forward: Forward, inputs: Any) -> Tensor:
    return forward(module, inputs).double()


def _equal(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= _TINY * one.abs().max())
