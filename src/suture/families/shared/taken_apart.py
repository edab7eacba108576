"""A classification model of `transformers` taken apart by running it: what its backbone hands on, and what follows.

Nothing is known here of single architectures. The feature is that one of a few candidates from which the rest of the
model makes the very logits that the whole makes; where there is none, the architecture is refused.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from suture.errors import CheckpointError, one_line

Pick = Callable[[Any], Tensor]  # a base model's output → features (B, D)


class Parts(NamedTuple):
    """A base model, the choice of its feature, and the width and number of axes that the feature has there."""

    backbone: nn.Module
    pick: Pick
    width: int
    axes: int


def pooled(output: Any) -> Tensor:
    """What the base model pools, flat."""
    return output.pooler_output.flatten(1)


def first_token(output: Any) -> Tensor:
    """The last hidden state of the first token, where there is no pooler."""
    return output.last_hidden_state[:, 0]


class Rest(nn.Module):
    """All of a classification model but its backbone: features (B, D) → logits (B, C)."""

    def __init__(self, model: nn.Module, prefix: str, axes: int):
        super().__init__()
        self.given = _Given(axes)
        setattr(model, prefix, self.given)
        self.model = model.eval()

    def forward(self, features: Tensor) -> Tensor:
        self.given.features = features
        try:
            return self.model().logits
        finally:
            self.given.features = None

    def last_linear(self, width: int) -> nn.Linear | None:
        """The linear layer whose output are the logits; None if there is no such layer."""
        outputs, layers = [], [layer for layer in self.modules() if isinstance(layer, nn.Linear)]
        hooks = [layer.register_forward_hook(lambda layer, _, out: outputs.append((layer, out))) for layer in layers]
        try:
            logits = self(torch.zeros(2, width))
        finally:
            for hook in hooks:
                hook.remove()
        return next((layer for layer, output in outputs if output is logits), None)


class Before(nn.Module):
    """What a rest does with features before its last linear layer."""

    def __init__(self, rest: Rest, last: nn.Linear):
        super().__init__()
        self.rest, self._seen = rest, None
        last.register_forward_pre_hook(self._look)

    def forward(self, features: Tensor) -> Tensor:
        self.rest(features)
        seen, self._seen = self._seen, None
        assert seen is not None
        return seen

    def _look(self, layer: nn.Module, inputs: tuple[Tensor]) -> None:
        self._seen = inputs[0]


class _Given(nn.Module):
    """Stands where the backbone was and hands on given features as if it had made them."""

    def __init__(self, axes: int):
        super().__init__()
        self.axes = axes
        self.features: Any = None

    def forward(self, *_: Any, **__: Any) -> Any:
        rows = self.features
        return _Output(rows[:, None], rows[(..., *[None] * (self.axes - 2))])


class _Output:
    """A base model's output by name or by number; what nobody gave is None."""

    def __init__(self, hidden: Tensor, pooled: Tensor):
        self.last_hidden_state, self.pooler_output = hidden, pooled

    def __getitem__(self, which: int | slice) -> Any:
        return (self.last_hidden_state, self.pooler_output)[which]

    def __getattr__(self, name: str) -> None:
        return None


@torch.no_grad()
def take_apart(model: Any, example: Mapping[str, Tensor], label: str) -> Parts:
    """Find a model's feature on an example of two inputs; the model itself is used up. Raises `CheckpointError`."""
    prefix, given = model.base_model_prefix, []
    backbone = getattr(model, prefix)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.eval().named_parameters():
        if not name.startswith(f"{prefix}."):  # a head of zeros would make the same of anything
            parameter.normal_(0, 0.5, generator=generator)
    hook = backbone.register_forward_hook(lambda module, _, output: given.append(output))
    try:
        logits = model(**example).logits
    except Exception as error:  # a model may ask for anything
        raise CheckpointError(f"'{label}' does not run on its own inputs: {one_line(error)}") from error
    hook.remove()
    for pick in (pooled, first_token):
        feature = _try(lambda pick=pick: pick(given[0]))
        if feature is None or feature.dim() != 2:
            continue
        axes = given[0].pooler_output.dim() if pick is pooled else 2
        made = _try(lambda axes=axes, feature=feature: Rest(model, prefix, axes)(feature))
        if made is not None and made.shape == logits.shape and torch.allclose(made, logits, rtol=1e-4, atol=1e-5):
            return Parts(backbone, pick, feature.shape[1], axes)
    raise CheckpointError(
        f"'{label}' is a {type(model).__name__}, whose head takes neither the pooled feature nor the first token's. "
        "Remedy: merge it with suture.merge and suture.adapt, which take any module."
    )


def _try(function: Callable[[], Tensor]) -> Tensor | None:
    try:
        return function()
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):  # not made for this
        return None
