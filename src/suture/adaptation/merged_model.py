"""A model with weights θ = θ₀ + Σ λ_t τ_t that computes the gradient of λ without a graph through the merge.

The merged parameters are plain leaves of a copy of the caller's module. With G = ∂L/∂θ of one tensor,
∂L/∂λ_t = ⟨G, τ_t⟩, so each G is reduced to one number per task as soon as it is ready, and freed.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from suture.adaptation.vectors import TensorVectors
from suture.errors import IncompatibleModels
from suture.merging.overflow import refuse_overflow
from suture.merging.task_vectors import TaskVectors, compute_dtype


class MergedModel:
    """A copy of a module, whose weights are rewritten for each set of coefficients.

    `module`: the copy, in the same mode as the caller's, on its device unless another is given. `names`: the merged
    tensors, first the parameters in the module's order, then its floating-point buffers, which are merged too but
    contribute no gradient. Integer and bool buffers and frozen tensors are the base's.
    """

    def __init__(
        self,
        module: nn.Module,
        vectors: TaskVectors,
        rows: Mapping[str, TensorVectors],
        device: torch.device | None = None,
    ):
        self.vectors = vectors
        self.names, targets = matched_tensors(module, vectors)
        self.module = _copy_of(module).to(device)
        state = self.module.state_dict(keep_vars=True)
        self.targets = [state[target] for target in targets]
        self._write_unchanged(state)
        self.device = self.targets[0].device if self.targets else torch.device("cpu")
        self.rows = [rows[name].to(self.device) for name in self.names]
        self._base = [_computed(vectors.base[name]).to(self.device) for name in self.names]
        self._leaves = [target for target in self.targets if isinstance(target, nn.Parameter)]
        self._products: list[Tensor] = []
        self._waiting = False

    @torch.no_grad()
    def write(self, coefficients: Float[Tensor, "task tensor"]) -> None:
        """Write θ₀ + Σ λ_t τ_t into the module."""
        for target, base, rows, column in zip(self.targets, self._base, self.rows, coefficients.T, strict=True):
            target.copy_(rows.combine(base, column))

    @torch.no_grad()
    def write_expert(self, task: str) -> None:
        """Write the weights of one fine-tuned model into the module."""
        for target, name in zip(self.targets, self.names, strict=True):
            target.copy_(self.vectors.models[task][name])

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Inside the block, every backward pass adds to the gradient of the coefficients."""
        parameters = [(i, p) for i, p in enumerate(self.targets) if isinstance(p, nn.Parameter)]
        hooks = [
            p.requires_grad_(True).register_post_accumulate_grad_hook(partial(self._take, i)) for i, p in parameters
        ]
        self._clear()
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def waiting(self, wait: bool) -> Iterator[None]:
        """Inside the block, with `wait`, gradients accumulate in the parameters for the next backward pass."""
        self._waiting = wait
        try:
            yield
        finally:
            self._waiting = False

    def backward(self, loss: Tensor) -> None:
        """Backpropagate to the merged parameters only; the caller's heads get no gradient."""
        loss.backward(inputs=self._leaves)

    def gradient(self) -> Float[Tensor, "task tensor"]:
        """∂L/∂λ of all backward passes since the last call, float64 on the CPU."""
        for i, target in enumerate(self.targets):
            if target.grad is not None:  # an earlier backward pass reached this tensor, but the last one did not
                self._take(i, target)
        gradient = torch.stack(self._products, dim=1).to("cpu", torch.float64)
        self._clear()
        return gradient

    def merged(self, coefficients: Float[Tensor, "task tensor"]) -> dict[str, Tensor]:
        """The merged checkpoint: the base's names, shapes and dtypes, tied names as one tensor, on the CPU.

        Raises `IncompatibleModels` if a result is too large for its dtype.
        """
        base = self.vectors.base
        state = {name: base[name].to("cpu", copy=True) for name in self.vectors.specs}
        for name, start, rows, column in zip(self.names, self._base, self.rows, coefficients.T, strict=True):
            merged = rows.combine(start, column).cpu()
            state[name].copy_(merged)
            refuse_overflow(name, merged, state[name])
        return state | {alias: state[name] for alias, name in base.aliases.items()}

    def _take(self, i: int, parameter: Tensor) -> None:
        if self._waiting or parameter.grad is None:
            return
        gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
        self._products[i] += self.rows[i].products(gradient)
        parameter.grad = None

    def _clear(self) -> None:
        self._products = [torch.zeros(len(rows), dtype=base.dtype, device=base.device) for rows, base in self._pairs()]

    def _pairs(self) -> Iterator[tuple[TensorVectors, Tensor]]:
        return zip(self.rows, self._base, strict=True)

    @torch.no_grad()
    def _write_unchanged(self, state: Mapping[str, Tensor]) -> None:
        for name in self.vectors.unchanged:
            if name in state:
                state[name].copy_(self.vectors.base[name])


def matched_tensors(module: nn.Module, vectors: TaskVectors) -> tuple[list[str], list[str]]:
    """(names in the checkpoints, names in the module) of the merged tensors, in the module's order.

    The module's own tensors that the base lacks, such as a head, are not touched. Raises `IncompatibleModels` if the
    base has a weight that the module lacks, or if shapes or ties differ.
    """
    state, base = module.state_dict(keep_vars=True), vectors.base
    parameters = [name for name, tensor in state.items() if isinstance(tensor, nn.Parameter)]
    targets: dict[str, str] = {}
    for target in [*parameters, *(name for name in state if name not in set(parameters))]:
        name = base.aliases.get(target, target)
        if name in vectors.names:
            _check_fit(name, targets.setdefault(name, target), target, state, base.specs[name].shape)
    for name in set(vectors.unchanged) & set(state):
        _check_fit(name, name, name, state, base.specs[name].shape)
    missing = sorted(set(vectors.names) - set(targets))
    if missing:
        raise IncompatibleModels(f"'{missing[0]}' is in the base but not in the module. {_REMEDY}")
    return list(targets), list(targets.values())


_REMEDY = "Remedy: give the module that these checkpoints belong to."


def _check_fit(name: str, first: str, target: str, state: Mapping[str, Tensor], shape: Sequence[int]) -> None:
    if state[target] is not state[first]:
        raise IncompatibleModels(f"'{target}' is tied to '{first}' in the base but not in the module. {_REMEDY}")
    if tuple(state[target].shape) != tuple(shape):
        own = tuple(state[target].shape)
        raise IncompatibleModels(f"'{name}' has shape {own} in the module but {tuple(shape)} in the base. {_REMEDY}")


def _copy_of(module: nn.Module) -> nn.Module:
    """A copy whose parameters have no gradient and require none."""
    copy = deepcopy(module)
    for parameter in copy.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    return copy


def _computed(tensor: Tensor) -> Tensor:
    return tensor.to(compute_dtype(tensor.dtype))
