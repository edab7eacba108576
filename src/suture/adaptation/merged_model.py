"""A model with weights θ = θ₀ + Σ λ_t τ_t that computes the gradient of λ without a graph through the merge.

The merged parameters are plain leaves of a copy of the caller's module. With G = ∂L/∂θ of one tensor,
∂L/∂λ_t = ⟨G, τ_t⟩, so each G is reduced to one number per task as soon as it is ready, and freed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import partial
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from suture.adaptation.flat import exact_products, flat_groups, in_buffers, widest
from suture.adaptation.vectors import Held, TensorVectors
from suture.errors import IncompatibleModels
from suture.merging.overflow import refuse_overflow
from suture.merging.task_vectors import TaskVectors, compute_dtype

T = TypeVar("T")


class MergedModel:
    """A copy of a module, whose weights are rewritten for each set of coefficients.

    `module`: the copy, in the same mode as the caller's, on its device unless another is given. `names`: the merged
    tensors, first the parameters in the module's order, then its floating-point buffers, which are merged too but
    contribute no gradient. Integer and bool buffers and frozen tensors are the base's. `flat`: tensors are views of one
    buffer, and merged by few large operations instead of one after another; by default everywhere but on a CPU, where
    it would gain nothing and cost the memory of one more model.
    """

    def __init__(
        self,
        module: nn.Module,
        vectors: TaskVectors,
        rows: Mapping[str, TensorVectors],
        device: torch.device | None = None,
        flat: bool | None = None,
    ):
        self.vectors = vectors
        self.names, targets = matched_tensors(module, vectors)
        self.module = _copy_of(module).to(device)
        state = self.module.state_dict(keep_vars=True)
        self.targets = [state[target] for target in targets]
        self._write_unchanged(state)
        self.device = self.targets[0].device if self.targets else torch.device("cpu")
        flat = in_buffers(self.device) if flat is None else flat
        own = [rows[name] for name in self.names]
        bases = [_computed(vectors.base[name]) for name in self.names]
        self._flat = flat_groups(self.module, self.targets, bases, own) if flat else []
        grouped = {member.index for group in self._flat for member in group.members}
        self._single = [i for i in range(len(self.names)) if i not in grouped]
        self._rows = {i: own[i].to(self.device) for i in self._single}
        self._base = {i: bases[i].to(self.device) for i in self._single}
        self._leaves = [target for target in self.targets if isinstance(target, nn.Parameter)]
        self._products: dict[int, Tensor] = {}
        self._waiting = False

    @property
    def separate(self) -> dict[str, TensorVectors]:
        """The task vectors of the tensors that are merged one after another, by name."""
        return {self.names[i]: rows for i, rows in self._rows.items()}

    def call(self, function: Callable[[], T]) -> T:
        """`function()`, which runs the module."""
        return function()

    @torch.no_grad()
    def write(self, coefficients: Float[Tensor, "task tensor"]) -> None:
        """Write θ₀ + Σ λ_t τ_t into the module."""
        if self._flat:
            self.write_sent(self.sent(coefficients))
        self._write_single(coefficients)

    @torch.no_grad()
    def write_sent(self, coefficients: Float[Tensor, "task tensor"]) -> None:
        """Write what lies in buffers, from coefficients on the device."""
        for group in self._flat:
            group.write(coefficients)

    def _write_single(self, coefficients: Tensor) -> None:
        with exact_products(self.device):
            for i in self._single:
                self.targets[i].copy_(self._rows[i].combine(self._base[i], coefficients[:, i]))

    def sent(self, coefficients: Tensor) -> Tensor:
        """The coefficients on the device, in one copy."""
        return coefficients.to(widest(self.device)).to(self.device, non_blocking=True)

    @contextmanager
    def in_full(self, coefficients: Float[Tensor, "task tensor"]) -> Iterator[nn.Module]:
        """Inside the block the module has the merged weights in their own dtypes, whatever it computes in."""
        with torch.no_grad(), ExitStack() as stack:
            self._write_single(coefficients)
            for group in self._flat:
                stack.enter_context(group.in_full(self.sent(coefficients)))
            yield self.module

    @torch.no_grad()
    def write_expert(self, task: str) -> None:
        """Write the weights of one fine-tuned model into the module."""
        for target, name in zip(self.targets, self.names, strict=True):
            target.copy_(self.vectors.models[task][name])

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Inside the block, every backward pass adds to the gradient of the coefficients."""
        for leaf in self._leaves:
            leaf.requires_grad_(True)
        parameters = [(i, self.targets[i]) for i in self._single if isinstance(self.targets[i], nn.Parameter)]
        hooks = [p.register_post_accumulate_grad_hook(partial(self._take, i)) for i, p in parameters]
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

    def backward(self, loss: Tensor, *others: Tensor) -> None:
        """Backpropagate to the merged parameters and to `others` only; the caller's heads get no gradient."""
        loss.backward(inputs=[*self._leaves, *others])

    def gradient(self) -> Float[Tensor, "task tensor"]:
        """∂L/∂λ of all backward passes since the last call, float64 where the device has it, on the device."""
        for i in self._single:
            if self.targets[i].grad is not None:  # an earlier backward pass reached this tensor, the last one did not
                self._take(i, self.targets[i])
        parts = [(group.products(), [member.index for member in group.members]) for group in self._flat]
        if self._single:
            parts.append((torch.stack(list(self._products.values()), dim=1).to(widest(self.device)), self._single))
        self._clear()
        order = sorted(range(len(self.names)), key=[i for _, indices in parts for i in indices].__getitem__)
        whole = torch.cat([columns for columns, _ in parts], dim=1) if len(parts) > 1 else parts[0][0]
        return whole if order == list(range(len(order))) else whole[:, order]

    def merged(self, coefficients: Float[Tensor, "task tensor"]) -> dict[str, Tensor]:
        """The merged checkpoint: the base's names, shapes and dtypes, tied names as one tensor, on the CPU.

        Raises `IncompatibleModels` if a result is too large for its dtype.
        """
        base = self.vectors.base
        state = {name: base[name].to("cpu", copy=True) for name in self.vectors.specs}
        for i, name in enumerate(self.names):
            merged = self._combined(i, coefficients[:, i]).cpu()
            state[name].copy_(merged)
            refuse_overflow(name, merged, state[name])
        return state | {alias: state[name] for alias, name in base.aliases.items()}

    def _combined(self, i: int, column: Tensor) -> Tensor:
        """One merged tensor, as `combine` gives it."""
        if i in self._rows:
            return self._rows[i].combine(self._base[i], column)
        group, member = next((g, m) for g in self._flat for m in g.members if m.index == i)
        return Held(member.rows(group.rows)).combine(member.view(group.base).contiguous(), column)

    def _take(self, i: int, parameter: Tensor) -> None:
        if self._waiting or parameter.grad is None:
            return
        gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
        with exact_products(self.device):
            self._products[i] += self._rows[i].products(gradient)
        parameter.grad = None

    def _clear(self) -> None:
        zeros = lambda i: torch.zeros(len(self._rows[i]), dtype=self._base[i].dtype, device=self.device)
        self._products = {i: zeros(i) for i in self._single}

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
