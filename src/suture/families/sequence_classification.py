"""Text classifiers of `transformers` (BERT, RoBERTa, DistilBERT, …): one merged encoder, and a head for each task.

The pretrained model is any directory of the same architecture, with or without a head. Tasks name one or two
`text_columns`.
"""

from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from suture.families.shared.classification import Classification
from suture.families.shared.texts import SETTINGS, TextReader


class SequenceClassification(Classification):
    """A model directory with its tokenizer; experts are models for `AutoModelForSequenceClassification`.

    Settings: `max_length` and `padding`, see `TextReader`.
    """

    name = "sequence_classification"
    architectures = ("ForSequenceClassification",)
    reads: ClassVar[Literal["pictures", "texts"]] = "texts"
    known_settings = SETTINGS
    auto = "AutoModelForSequenceClassification"

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
