"""A task's head: from the features of an encoder that all tasks share to one logit a class."""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import linear, normalize


@dataclass(frozen=True, eq=False)
class Head:
    """From features (B, D) to logits (B, C): scale · features · weightsᵀ + bias, on the features' device.

    `weights` is (C, D) and `bias` (C,). Features are brought to length one first where `normalised` says so, as the
    cosine of zero-shot heads wants it. `before` are layers of the task's own between the encoder and the weights.

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
