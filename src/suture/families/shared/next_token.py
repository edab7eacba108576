"""Causal language models as encoders: tokens to hidden states, and hidden states to logits of the next token."""

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from suture.families.shared.base import Encoder
from suture.families.shared.models import Naming, copy_into


class NextToken(Encoder):
    """A causal language model: tokens (B, L) with their mask → the last hidden state of each text's last token (B, D).

    With `scored`, a mask (B, L), the states of all scored positions are given instead, one text after another. With
    `past_key_values`, a cache of `transformers`, the tokens continue the cached ones and are added to the cache, and
    the mask covers both. Padding may stand on either side.
    """

    def __init__(self, model: Any, naming: Naming, scale: float, softcap: float | None):
        super().__init__()
        for name, part in model.named_children():
            self.add_module(name, part)
        self._base, self._output = model.base_model_prefix, _output_name(model)
        self._naming, self.scale, self.softcap = naming, scale, softcap
        self.config = model.config  # the layers' kinds of cache

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        scored: Tensor | None = None,
    ) -> Tensor:
        if scored is None and past_key_values is None:
            length = int((attention_mask * torch.arange(1, attention_mask.shape[1] + 1).to(attention_mask)).max())
            input_ids, attention_mask = input_ids[:, :length], attention_mask[:, :length]
        more = {} if position_ids is None else {"position_ids": position_ids}
        base = self.get_submodule(self._base)
        if past_key_values is not None:
            more[_cache_argument(base)] = past_key_values
        hidden = base(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=past_key_values is not None, **more
        ).last_hidden_state
        if scored is not None:
            return hidden[scored]
        mask = attention_mask[:, -input_ids.shape[1] :]
        last = mask.shape[1] - 1 - mask.flip(1).long().argmax(1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last]

    def next_token_logits(self, features: Tensor) -> Tensor:
        """Logits (…, V) of the next token, from hidden states (…, D), by the model's own output layer."""
        logits = self.get_output_embeddings()(self.scale * features)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def get_output_embeddings(self) -> nn.Module:
        """The output layer, by the name that transformers' models give it."""
        return self.get_submodule(self._output)

    def new_cache(self) -> Any:
        """An empty cache of keys and values, of the kinds that the layers need."""
        from transformers import DynamicCache

        return DynamicCache(config=self.config)

    def load(self, state: Mapping[str, Tensor]) -> "NextToken":
        """Copy in the weights of another model of this architecture; raises `CheckpointError` if they do not fit."""
        copy_into(self, state, self._naming)
        return self


def _cache_argument(base: nn.Module) -> str:
    """The name of the argument that takes a cache, which transformers 5.24 changed."""
    return "cache" if "cache" in signature(base.forward).parameters else "past_key_values"


def output_layer(model: Any) -> Callable[[Tensor], Tensor] | None:
    """The output layer of a `NextToken`, or of the first inside a repaired model; None if there is none."""
    parts = model.modules() if isinstance(model, nn.Module) else ()
    return next((part.next_token_logits for part in parts if isinstance(part, NextToken)), None)


def _output_name(model: Any) -> str:
    layer = model.get_output_embeddings()
    return next(name for name, part in model.named_children() if part is layer)
