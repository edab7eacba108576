"""AdaRank: learned masks of the singular components of task vectors. https://arxiv.org/abs/2503.22178

A component is on where its logit is above 0, so the forward pass is exact; the gradient goes through m = σ(logit / τ)
as if that were the mask: ∂L/∂logit_i = λ σ_i uᵢᵀGvᵢ · m(1 − m)/τ, without a graph through the merge.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from suture.merging.roles import Role

_ON = 0.1  # the logit at the start of a component that is on; −0.1 of one that is off


@dataclass(frozen=True)
class MaskedComponents:
    """The task vectors of one matrix by their singular components, of which `logits` (task, k) turn some on.

    `left` (task, out, k) has the singular values in it; `right` is (task, k, in). `gradient` is ∂L/∂logits of all
    backward passes since `take_gradient`, for the coefficients of the last `combine`.
    """

    left: Float[Tensor, "task out k"]
    right: Float[Tensor, "task k inner"]
    logits: Float[Tensor, "task k"]
    temperature: float
    role: Role
    _state: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, deltas: Float[Tensor, "task entry"], role: Role, share: float, temperature: float):
        """The components of a matrix, of which the first ⌊share · k⌋ of each task are on."""
        matrices = role.matrices(deltas).double()
        left, values, right = torch.linalg.svd(matrices, full_matrices=False)
        first = torch.arange(values.shape[1]) < int(share * values.shape[1])
        logits = torch.where(first, _ON, -_ON).double().expand_as(values).clone().requires_grad_()
        return cls((left * values[:, None]).to(deltas), right.to(deltas), logits, temperature, role)

    def __len__(self) -> int:
        return len(self.left)

    def to(self, device: torch.device) -> "MaskedComponents":
        return replace(self, left=self.left.to(device), right=self.right.to(device))

    @property
    def _mask(self) -> Float[Tensor, "task k"]:
        return (self.logits.detach() > 0).to(self.left)

    def combine(self, base: Tensor, column: Float[Tensor, " task"]) -> Tensor:
        """θ₀ + Σ λ_t τ_t of the components that are on, in the base's shape and dtype."""
        self._state["column"] = column.detach().double().cpu()
        scaled = self.left * (self._mask * column.to(self.left)[:, None])[:, None]
        update = scaled.movedim(0, 1).flatten(1) @ self.right.flatten(0, 1)
        return base + self.role.joined([update]).view(base.shape).to(base.dtype)

    def products(self, gradient: Tensor) -> Float[Tensor, " task"]:
        """⟨G, τ_t⟩ for every task; the logits' gradient is collected beside it."""
        matrix = self.role.matrices(gradient.reshape(-1).to(self.left))
        each = ((self.left.mT @ matrix) * self.right).sum(2)
        soft = (self.logits.detach() / self.temperature).sigmoid()
        slope = self._state["column"][:, None] * soft * (1 - soft) / self.temperature
        more = slope * each.double().cpu()
        self._state["gradient"] = self._state["gradient"] + more if "gradient" in self._state else more
        return (each * self._mask).sum(1)

    def take_gradient(self) -> Float[Tensor, "task k"]:
        """∂L/∂logits in float64; what is collected afterwards begins at 0."""
        return self._state.pop("gradient", torch.zeros_like(self.logits))


def mask_leaves(rows: Any) -> dict[str, MaskedComponents]:
    """Name → components of the tensors whose components are masked."""
    return {name: each for name, each in rows.items() if isinstance(each, MaskedComponents)}
