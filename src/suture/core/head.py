"""A task's head: maps the features of the encoder that all tasks share to one logit per class."""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import linear, normalize


@dataclass(frozen=True, eq=False)
class Head:
    """Logits (B, C) from features (B, D): scale · features · weightsᵀ + bias, on the features' device.

    `weights` is (C, D) and `bias` (C,). With `normalised` the features are first scaled to length one, as zero-shot
    heads need for their cosines. `before`: the task's own layers between the encoder and the weights.

    >>> import torch
    >>> Head(torch.eye(2), bias=torch.tensor([0.0, 5.0]))(torch.tensor([[3.0, 1.0]]))
    tensor([[3., 6.]])
    """

    weights: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    normalised: bool = False
    before: nn.Module | None = None

    def __call__(self, features: Tensor) -> Tensor:
        device = features.device
        rows = features if self.before is None else self.before.to(device)(features)
        rows = normalize(rows, dim=-1) if self.normalised else rows
        bias = None if self.bias is None else self.bias.to(device)
        return linear(self.scale * rows, self.weights.to(device), bias)
