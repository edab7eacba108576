"""Text classifiers of `transformers` (BERT, RoBERTa, DistilBERT, …): one merged encoder, and a head for each task.

The pretrained model is any directory of the same architecture, with or without a head. Tasks name one or two
`text_columns`. With `heads`, all models are backbones without a head, and a task's head is a linear layer in a file.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from suture.families.shared.classification import Classification
from suture.families.shared.pooled import PooledTexts
from suture.families.shared.texts import SETTINGS, TextReader


class Headless(PooledTexts):
    """Backbones without a head, pooled as `pooling` says, and linear layers in files."""

    name = "sequence_classification"


class SequenceClassification(Classification):
    """A model directory with its tokenizer; experts are models for `AutoModelForSequenceClassification`.

    Settings: `max_length` and `padding`, see `TextReader`; `heads`, a mapping task → file of a linear layer, and
    `pooling`, see `PooledTexts`, for models without a head.
    """

    name = "sequence_classification"
    architectures = ("ForSequenceClassification",)
    reads: ClassVar[Literal["pictures", "texts"]] = "texts"
    known_settings = SETTINGS | {"heads", "pooling"}
    auto = "AutoModelForSequenceClassification"

    def __new__(
        cls, directory: Any, weights: Any = None, settings: Mapping[str, Any] | None = None, experts: Any = None
    ):
        """Models without a head, which `heads` or `pooling` say they are, are another class of the same interface."""
        if settings and (settings.get("heads") or settings.get("pooling")):
            return Headless(directory, weights, settings, experts)
        return super().__new__(cls)

    @cached_property
    def reader(self) -> TextReader:
        """The model's tokenizer."""
        return TextReader(self.directory, self.settings, getattr(self.config, "max_position_embeddings", None))

    def prepare(self) -> nn.Module:
        return self.reader.trim()

    def example(self) -> dict[str, Tensor]:
        ids = self.reader.tokenizer(["a", "b"])["input_ids"]
        rows = torch.tensor([row[:1] * 2 if len(row) < 2 else row[:2] for row in ids])
        rows[1, 1] = (rows[0, 1] + 1) % self.config.vocab_size  # the two inputs must differ
        return {"input_ids": rows, "attention_mask": torch.ones_like(rows)}


FAMILY = SequenceClassification
