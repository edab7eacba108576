"""Merged models with the merge in the autograd graph, as in FusionBench.

They are for code written against this form. `suture.adapt` computes the same gradients without a graph through the
merge, in a fraction of the memory.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from suture.errors import ConfigError, IncompatibleModels


def get_task_wise_weights(num_models: int, init_values: float | None = None) -> Float[Tensor, " task"]:
    """Initial coefficients (num_models,): `init_values` each, or 1/num_models.

    >>> get_task_wise_weights(2, 0.3)
    tensor([0.3000, 0.3000])
    """
    return torch.full((num_models,), 1 / num_models if init_values is None else float(init_values))


def get_layer_wise_weights(
    num_models: int, num_layers: int, init_values: float | None = None
) -> Float[Tensor, "task layer"]:
    """Initial coefficients (num_models, num_layers): `init_values` each, or 1/num_models."""
    return get_task_wise_weights(num_models, init_values)[:, None].repeat(1, num_layers)


class _MergedModel(nn.Module):
    """A module with weights θ = θ₀ + Σ λ τ, for the parameters that require a gradient.

    Other parameters and all buffers are the pretrained model's and have no coefficient, as in FusionBench. Weights that
    are tied in the pretrained model have one coefficient and stay tied, in calls and in `merge_and_unload`. So
    `tie_weights` and `strict` have no effect: they are accepted for code written for FusionBench, whose calls leave the
    second of two tied names at the pretrained weights unless `tie_weights=True`.

    Raises `ConfigError` for coefficients of another shape, and `IncompatibleModels` for fine-tuned models in which tied
    weights differ.
    """

    def __init__(
        self,
        weight: Tensor,
        pretrained_model: nn.Module,
        finetuned_models: Sequence[nn.Module],
        clamp_weights: bool = True,
        tie_weights: bool = False,
        strict: bool = True,
    ):
        super().__init__()
        self.clamp_weights = clamp_weights
        self.tie_weights, self.strict = tie_weights, strict
        self.merge_weight = nn.Parameter(weight.clone())
        self.pretrained_model = copy.deepcopy(pretrained_model).requires_grad_(False)
        base = dict(pretrained_model.named_parameters())
        self.layers = [name for name, parameter in base.items() if parameter.requires_grad]
        rows = [dict(model.named_parameters()) for model in finetuned_models]
        self._check(len(rows))
        for number, model in enumerate(finetuned_models):
            _check_ties(pretrained_model, model, number)
        self._vectors = [{n: (row[n] - base[n]).detach() for n in self.layers} for row in rows]
        self._merged: dict[str, Tensor] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the coefficients of one task."""
        raise NotImplementedError

    def column(self, weight: Tensor, index: int) -> Float[Tensor, " task"]:
        """The coefficients of the tensor `layers[index]`."""
        raise NotImplementedError

    def merge_weights(self) -> dict[str, Tensor]:
        """Merge with the current coefficients; later calls of the model use the result."""
        weight = self.merge_weight.clamp(0, 1) if self.clamp_weights else self.merge_weight
        base = dict(self.pretrained_model.named_parameters())
        self._merged = {
            name: base[name] + sum(c * v[name] for c, v in zip(self.column(weight, i), self._vectors, strict=True))
            for i, name in enumerate(self.layers)
        }
        return self._merged

    def merge_and_unload(self) -> nn.Module:
        """A plain module with the merged weights."""
        merged = copy.deepcopy(self.pretrained_model)
        state = {name: tensor.detach() for name, tensor in self.merge_weights().items()}
        merged.load_state_dict(state, strict=False)
        return merged

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        merged = self.merge_weights() if self._merged is None else self._merged
        return torch.func.functional_call(self.pretrained_model, merged, args, kwargs, tie_weights=True, strict=False)

    def _check(self, models: int) -> None:
        shape = (models, *self.shape)
        if tuple(self.merge_weight.shape) != shape:
            raise ConfigError(f"The coefficients have shape {tuple(self.merge_weight.shape)}; wanted {shape}.")


def _check_ties(base: nn.Module, model: nn.Module, number: int) -> None:
    """Raise `IncompatibleModels` if two names of one parameter in the base have different values in the model."""
    first = {id(parameter): name for name, parameter in base.named_parameters()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in base.named_parameters(remove_duplicate=False):
        other = first[id(parameter)]
        if name != other and not torch.equal(parameters[name], parameters[other]):
            raise IncompatibleModels(
                f"'{name}' is tied to '{other}' in the pretrained model but not in fine-tuned model {number}. "
                "Remedy: tie them in that model, or untie them in the pretrained one."
            )


class TaskWiseMergedModel(_MergedModel):
    """One coefficient per task: `TaskWiseMergedModel(task_wise_weight, pretrained_model, finetuned_models)`."""

    @property
    def shape(self) -> tuple[int, ...]:
        return ()

    def column(self, weight: Tensor, index: int) -> Float[Tensor, " task"]:
        return weight


class LayerWiseMergedModel(_MergedModel):
    """One coefficient per task and parameter tensor: `LayerWiseMergedModel(layer_wise_weight, pretrained_model, …)`."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.layers),)

    def column(self, weight: Tensor, index: int) -> Float[Tensor, " task"]:
        return weight[:, index]
