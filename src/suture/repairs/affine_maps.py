"""Affine maps of the final feature, one for each task, and their folding into linear heads."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from suture.core.head import Head
from suture.errors import ConfigError, IncompatibleModels


class AffineMaps(nn.Module):
    """ẑ = A z + c for all tasks: `weight` (task, dim, dim) is A, `bias` (task, dim) is c.

    It takes the place of `SurgeryModules` at the final feature.

    >>> import torch
    >>> maps = AffineMaps(2 * torch.eye(2)[None], torch.tensor([[0.0, 1.0]]))
    >>> maps(torch.tensor([[[3.0, 4.0]]]), slice(0, 1))
    tensor([[[6., 9.]]])
    """

    variant: ClassVar[str] = "affine"
    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Float[Tensor, "task dim dim"], bias: Float[Tensor, "task dim"]):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    @property
    def rank(self) -> int:
        """The largest rank of A: the width of the features."""
        return self.weight.shape[1]

    def forward(self, features: Float[Tensor, "row position dim"], which: slice | Tensor) -> Tensor:
        """ẑ, of the same shape and dtype; `which`: see `SurgeryModules`."""
        if features.shape[-1] != self.rank:
            raise IncompatibleModels(
                f"The backbone gives features of width {features.shape[-1]}, an affine map takes {self.rank}. "
                "Remedy: put it beside the backbone that it was fitted to."
            )
        z = features.to(self.weight.dtype)
        if isinstance(which, Tensor):  # task by task, because a copy of A for every row could be large
            result = z.clone()
            for task in which.unique().tolist():
                result[which == task] = z[which == task] @ self.weight[task].T + self.bias[task]
            return result.to(features.dtype)
        weight, bias = self.weight[which], self.bias[which]
        grouped = z.reshape(len(weight), -1, self.rank)
        return (grouped @ weight.mT + bias[:, None]).view_as(features).to(features.dtype)

    def prepared(self, features: Tensor) -> Tensor:
        """The features as they are compared with the expert's."""
        return features

    def only(self, task: int) -> "AffineMaps":
        """A copy with one task's map only."""
        return AffineMaps(self.weight[task : task + 1].clone(), self.bias[task : task + 1].clone())

    def fold_into_head(self, head: Head, task: int) -> Head:
        """The head of A z + c as a head of z: W' = W·A and b' = s·W·c + b, with the head's scale s.

        Raises `ConfigError` for a head that normalises the features first or has layers of its own before its weights.
        """
        if problem := unfoldable(head):
            raise ConfigError(f"An affine map cannot be folded into a head that {problem}. Remedy: keep it beside it.")
        weights, dtype = head.weights.double(), head.weights.dtype
        a, c = (tensor[task].to(weights) for tensor in (self.weight, self.bias))
        bias = head.scale * weights @ c + (0 if head.bias is None else head.bias.double())
        return replace(head, weights=(weights @ a).to(dtype), bias=bias.to(dtype))


def unfoldable(head: Head) -> str:
    """The reason why no affine map can be folded into a head; empty if it can."""
    if head.normalised:
        return "normalises the features first, as zero-shot heads do for their cosines"
    return "has layers of its own before its weights" if head.before is not None else ""


def fold_into_heads(maps: AffineMaps, tasks: Sequence[str], heads: Mapping[str, Head]) -> dict[str, Head]:
    """Every task's head with its map folded in; raises `ConfigError` as `AffineMaps.fold_into_head`."""
    return {task: maps.fold_into_head(heads[task], i) for i, task in enumerate(tasks)}
