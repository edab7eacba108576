"""A frozen module of any architecture, whose blocks' outputs can be read and corrected from outside.

Block outputs are presented as (row, position, dim): tokens (B, tokens, width), feature maps (B, C, H, W), plain
features (B, width), and sequence-first tokens (tokens, B, width) are converted to this form and back.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from suture.adaptation.blocks import Block, Blocks, find_blocks, frozen_copy, output_tensor, submodule
from suture.core.autocasting import autocast_dtype
from suture.core.batches import Forward, call, device_of
from suture.errors import ConfigError

__all__ = ["FINAL", "Block", "Blocks", "Network", "by_layer", "find_blocks", "layers_of", "position_mean"]

#: The layer name of the final feature; all other layers are blocks, named by their paths.
FINAL = "(features)"
#: visit(i, rows) gets the i-th layer's output (row, position, dim) and returns its replacement, or None to keep it.
Visit = Callable[[int, Tensor], Tensor | None]


class Network(nn.Module):
    """A copy of a module in evaluation mode, without gradients, that shares its parameters' memory with the original.

    Its layers are the blocks, in the given order, and then the final feature. `precision` is the dtype of autocast in
    its last pass through blocks, None without.
    """

    def __init__(self, module: nn.Module, forward: Forward = call, blocks: Sequence[Block] = ()):
        super().__init__()
        self.module, self.encode = frozen_copy(module), forward
        self.blocks = tuple(blocks)
        self.precision: torch.dtype | None = None
        self._visit: Visit | None = None
        for i, block in enumerate(self.blocks):
            submodule(self.module, block.path).register_forward_hook(partial(self._hook, i))

    @property
    def device(self) -> torch.device:
        """The device that inputs must be on."""
        return device_of(self.module)

    def forward(self, inputs: Any, visit: Visit | None = None) -> Tensor:
        """The features (B, dim), after a `visit` to every layer."""
        self._visit = visit
        try:
            features = self.encode(self.module, inputs)
        finally:
            self._visit = None
        if features.dim() != 2:
            shape = tuple(features.shape)
            raise ConfigError(f"The module gives {shape}; wanted features (batch, dim). Remedy: give forward=…")
        corrected = None if visit is None else visit(len(self.blocks), features[:, None])
        return features if corrected is None else corrected[:, 0]

    def _hook(self, i: int, module: nn.Module, arguments: Any, output: Any) -> Any:
        if self._visit is None:
            return None
        rows, back = _as_rows(output_tensor(output, self.blocks[i].path), self.blocks[i])
        self.precision = autocast_dtype(rows.device)
        corrected = self._visit(i, rows)
        if corrected is None:
            return None
        return (back(corrected), *output[1:]) if isinstance(output, tuple) else back(corrected)


def _as_rows(output: Tensor, block: Block) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The output as (row, position, dim), and the function that converts it back."""
    axes = (block.batch_axis, block.channel_axis)
    moved = output.movedim(axes, (0, -1))
    rows = moved[:, None] if moved.dim() == 2 else moved.flatten(1, -2)
    return rows, lambda corrected: corrected.reshape(moved.shape).movedim((0, -1), axes)


def position_mean(rows: Float[Tensor, "row position dim"], inputs: Any) -> Float[Tensor, "row dim"]:
    """The mean over positions, or, for texts with an `attention_mask`, over those that are not padding."""
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if mask is None or not 1 < rows.shape[1] <= mask.shape[1]:
        return rows.mean(1)
    weights = mask[:, : rows.shape[1]].to(rows)[..., None]
    return (rows * weights).sum(1) / weights.sum(1)


def layers_of(blocks: Sequence[Block]) -> list[str]:
    """The names of all layers: the blocks' paths, and that of the final feature."""
    return [*(block.path for block in blocks), FINAL]


def by_layer(rows: Tensor, blocks: Sequence[Block]) -> list[Tensor]:
    """Encodings (…, width) split by layer: (…, dim) each."""
    widths = [block.dim for block in blocks]
    return list(rows.split([*widths, rows.shape[-1] - sum(widths)], dim=-1))
