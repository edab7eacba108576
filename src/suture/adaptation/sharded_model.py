"""A merged model of which every process holds a part: weights, base and task vectors are split like the parameters.

With the rows of one process written G_p and τ_p, ⟨G, τ⟩ = Σ_p ⟨G_p, τ_p⟩. Files are mapped, and each process reads only
its rows, so a process holds (T + 3)/n model sizes beside the activations and the layer that is gathered.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from suture.adaptation.flat import exact_products, widest
from suture.adaptation.merged_model import matched_tensors
from suture.adaptation.objectives import Objective
from suture.adaptation.options import AdaMergingOptions
from suture.adaptation.vectors import TensorVectors, task_vector_rows
from suture.core.fabric import Team
from suture.core.sharding import Sharded, is_sharded, local, own_rows, part_of
from suture.errors import ConfigError
from suture.merging.overflow import refuse_overflow
from suture.merging.task_vectors import TaskVectors, compute_dtype

T = TypeVar("T")


class ShardedModel:
    """`MergedModel` on the processes of a `team`, all of which make the same calls.

    `module` may have its weights on the meta device. `targets` are this process's parts. The gradient of each process
    is that of its part, and the sum over processes is the whole; buffers and scalars are not split.
    """

    def __init__(self, module: nn.Module, vectors: TaskVectors, options: AdaMergingOptions, team: Team):
        assert team.device is not None
        self.vectors, self.options, self.device = vectors, options, team.device
        self.rank, self.world = team.rank, team.world
        self.names, targets = matched_tensors(module, vectors)
        own = module.state_dict(keep_vars=True)
        learned = {id(own[target]) for target in targets if isinstance(own[target], nn.Parameter)}
        self._sharded = Sharded(module, learned, team.device)
        self._sharded.materialise()
        self.module = self._sharded.module
        state = self.module.state_dict(keep_vars=True)
        self.targets = [state[target] for target in targets]
        parts = {
            name: part_of(vectors.base.specs[name].shape, self.rank, self.world)
            for name, target in zip(self.names, self.targets, strict=True)
            if is_sharded(target)
        }
        self._fill(own, state, {id(own[target]) for target in targets})
        self._base = [self._base_part(name, target) for name, target in zip(self.names, self.targets, strict=True)]
        rows = task_vector_rows(vectors, options, parts)
        self._rows = [rows[name].to(self.device) for name in self.names]

    @property
    def separate(self) -> dict[str, TensorVectors]:
        """The task vectors by name."""
        return dict(zip(self.names, self._rows, strict=True))

    def call(self, function: Callable[[], T]) -> T:
        """`function()`, which runs the module."""
        return self._sharded.call(function)

    @torch.no_grad()
    def write(self, coefficients: Float[Tensor, "task tensor"]) -> None:
        """Write this process's part of θ₀ + Σ λ_t τ_t into the module."""
        self._sharded.renewed()
        with exact_products(self.device):
            for i, target in enumerate(self.targets):
                local(target).copy_(self._rows[i].combine(self._base[i], coefficients[:, i]))

    @contextmanager
    def in_full(self, coefficients: Float[Tensor, "task tensor"]) -> Iterator[nn.Module]:
        """Inside the block the module has the merged weights."""
        self.write(coefficients)
        yield self.module

    def write_expert(self, task: str) -> None:
        """Not for sharded models: processes would have to take turns."""
        raise ConfigError(_refusal("an objective of experts' outputs"))

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Inside the block, every backward pass adds to the gradient of the coefficients."""
        self._clear()
        yield
        self._clear()

    @contextmanager
    def waiting(self, wait: bool) -> Iterator[None]:
        """Gradients always accumulate until `gradient` is called."""
        yield

    def backward(self, loss: Tensor, *others: Tensor) -> None:
        """Backpropagate; FSDP gives every process the mean over processes of its rows' gradient."""
        loss.backward()

    @torch.no_grad()
    def gradient(self) -> Float[Tensor, "task tensor"]:
        """∂L/∂λ of all backward passes since the last call that this process's part contributes."""
        columns = []
        for rows, base, target in zip(self._rows, self._base, self.targets, strict=True):
            if target.grad is None:
                columns.append(torch.zeros(len(rows), dtype=widest(self.device), device=self.device))
                continue
            with exact_products(self.device):
                products = rows.products(local(target.grad).to(base.dtype)).to(widest(self.device))
            columns.append(products * self.world if is_sharded(target) else products)
        self._clear()
        return torch.stack(columns, dim=1)

    def merged(self, coefficients: Float[Tensor, "task tensor"]) -> dict[str, Tensor]:
        """The merged checkpoint, as `MergedModel.merged` gives it, in process 0, from the files; {} in the others."""
        if self.rank > 0:
            return {}
        base = self.vectors.base
        state = {name: base[name].to("cpu", copy=True) for name in self.vectors.unchanged}
        rows = task_vector_rows(self.vectors, replace(self.options, stream_vectors=True))
        for i, name in enumerate(self.names):
            own = rows[name].to(torch.device("cpu"))
            merged = own.combine(base[name].to(compute_dtype(base.specs[name].dtype)), coefficients[:, i])
            state[name] = merged.to(base.specs[name].dtype)
            refuse_overflow(name, merged, state[name])
        ordered = {name: state[name] for name in self.vectors.specs}
        return ordered | {alias: state[name] for alias, name in base.aliases.items()}

    def _base_part(self, name: str, target: Tensor) -> Tensor:
        part = part_of(tuple(target.shape), self.rank, self.world) if is_sharded(target) else slice(None)
        values = self.vectors.base.flat(name)[part].to(compute_dtype(target.dtype))
        return values.view(local(target).shape).to(self.device)

    def _clear(self) -> None:
        for target in self.targets:
            target.grad = None

    @torch.no_grad()
    def _fill(self, own: Mapping[str, Tensor], state: Mapping[str, Tensor], merged: set[int]) -> None:
        """Write what is not among the `merged` ids: from the base, or from the caller's module."""
        aliases, unchanged = self.vectors.base.aliases, set(self.vectors.unchanged)
        for name, target in state.items():
            if id(own[name]) in merged:
                continue
            if (stored := aliases.get(name, name)) in unchanged:
                local(target).copy_(self._base_part(stored, target))
            elif own[name].is_meta:
                raise ConfigError(f"'{name}' is on the meta device and not in the base. Remedy: give its values.")
            else:
                local(target).copy_(own_rows(own[name].detach(), target))


def refuse_unsharded(options: AdaMergingOptions, objective: Objective, eval_iterations: int) -> None:
    """Raise `ConfigError` for what needs whole weights in each process."""
    needs = {
        "an objective of experts' outputs": objective.expert,
        "rank_share": options.rank_share is not None,
        "eval_iterations": eval_iterations > 0,
    }
    if wrong := next((name for name, there in needs.items() if there), None):
        raise ConfigError(_refusal(wrong))


def _refusal(what: str) -> str:
    return f"fabric.strategy=fsdp with {what}: each process has only a part of the weights. Remedy: leave out one."
