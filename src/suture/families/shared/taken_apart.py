"""Splitting a classification model of `transformers` into backbone, feature and head, by running it.

There is no code for particular architectures. The feature is the one of a few candidates from which the rest of the
model computes the same logits as the whole model; if there is none, the architecture is refused.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from suture.errors import CheckpointError, one_line

Pick = Callable[[Any], Tensor]  # a base model's output → features (B, D)


class Split(NamedTuple):
    """A base model, the function that picks its feature, the feature's width, and its number of axes in the output."""

    backbone: nn.Module
    pick: Pick
    width: int
    axes: int


def pooled(output: Any) -> Tensor:
    """The base model's pooled output, flattened to (B, D)."""
    return output.pooler_output.flatten(1)


def first_token(output: Any) -> Tensor:
    """The last hidden state of the first token, (B, D), for models without a pooler."""
    return output.last_hidden_state[:, 0]


class Rest(nn.Module):
    """A classification model without its backbone: features (B, D) → logits (B, C)."""

    def __init__(self, model: nn.Module, prefix: str, axes: int):
        super().__init__()
        self.stand_in = _StandIn(axes)
        setattr(model, prefix, self.stand_in)
        self.model = model.eval()

    def forward(self, features: Tensor) -> Tensor:
        self.stand_in.features = features
        try:
            return self.model().logits
        finally:
            self.stand_in.features = None

    def last_linear(self, width: int) -> nn.Linear | None:
        """The linear layer whose output is the logits; None if there is no such layer."""
        outputs, layers = [], [layer for layer in self.modules() if isinstance(layer, nn.Linear)]
        hooks = [layer.register_forward_hook(lambda layer, _, out: outputs.append((layer, out))) for layer in layers]
        try:
            logits = self(torch.zeros(2, width))
        finally:
            for hook in hooks:
                hook.remove()
        return next((layer for layer, output in outputs if output is logits), None)


class Before(nn.Module):
    """The layers of a `Rest` before its last linear one: features (B, D) → inputs of that layer."""

    def __init__(self, rest: Rest, last: nn.Linear):
        super().__init__()
        self.rest, self._input = rest, None
        last.register_forward_pre_hook(self._store)

    def forward(self, features: Tensor) -> Tensor:
        self.rest(features)
        stored, self._input = self._input, None
        assert stored is not None
        return stored

    def _store(self, layer: nn.Module, inputs: tuple[Tensor]) -> None:
        self._input = inputs[0]


class _StandIn(nn.Module):
    """Takes the backbone's place in a model and returns the `features` set on it."""

    def __init__(self, axes: int):
        super().__init__()
        self.axes = axes
        self.features: Any = None

    def forward(self, *_: Any, **__: Any) -> Any:
        rows = self.features
        return _Output(rows[:, None], rows[(..., *[None] * (self.axes - 2))])


class _Output:
    """A base model's output, by name or by index; any other attribute is None."""

    def __init__(self, hidden: Tensor, pooled: Tensor):
        self.last_hidden_state, self.pooler_output = hidden, pooled

    def __getitem__(self, index: int | slice) -> Any:
        return (self.last_hidden_state, self.pooler_output)[index]

    def __getattr__(self, name: str) -> None:
        return None


@torch.no_grad()
def take_apart(model: Any, example: Mapping[str, Tensor], label: str) -> Split:
    """Split a model, finding its feature on two example inputs. The model cannot be used afterwards.

    Raises `CheckpointError` for a model that does not run, or whose head takes another feature.
    """
    prefix, outputs = model.base_model_prefix, []
    backbone = getattr(model, prefix)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.eval().named_parameters():
        if not name.startswith(f"{prefix}."):  # a head of zeros would accept any feature
            parameter.normal_(0, 0.5, generator=generator)
    hook = backbone.register_forward_hook(lambda module, _, output: outputs.append(output))
    try:
        logits = model(**example).logits
    except Exception as error:  # a model can raise anything
        raise CheckpointError(f"'{label}' does not run on its own inputs: {one_line(error)}") from error
    hook.remove()
    for pick in (pooled, first_token):
        feature = _try(lambda pick=pick: pick(outputs[0]))
        if feature is None or feature.dim() != 2:
            continue
        axes = outputs[0].pooler_output.dim() if pick is pooled else 2
        result = _try(lambda axes=axes, feature=feature: Rest(model, prefix, axes)(feature))
        if result is not None and result.shape == logits.shape and torch.allclose(result, logits, 1e-4, 1e-5):
            return Split(backbone, pick, feature.shape[1], axes)
    raise CheckpointError(
        f"'{label}' is a {type(model).__name__}, whose head takes neither the pooled feature nor the first token's. "
        "Remedy: merge it with suture.merge and suture.adapt, which take any module."
    )


def _try(function: Callable[[], Tensor]) -> Tensor | None:
    try:
        return function()
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):  # this feature is not the one
        return None
