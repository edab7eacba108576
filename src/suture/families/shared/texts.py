"""From texts to token ids: the tokenizers of `transformers`, one text or a pair of them to an input."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from suture.core.progress import Track
from suture.errors import CheckpointError, ConfigError, one_line, shown
from suture.families.shared.pictures import quiet
from suture.tasks.base import Texts

SETTINGS = frozenset({"max_length", "padding"})
_BATCH = 1024
_LONGEST = 512  # tokens, where neither setting nor model says


class TextReader:
    """Tokenizes texts, or the prompts that their template makes of them, and pads them on the right.

    Settings: `max_length` in tokens, where texts are cut (by default what the model can take, 512 at most), and
    `padding`: "batch" pads to the longest text of a batch, "max_length" to that length always.
    """

    def __init__(self, directory: Path, settings: Any, positions: int | None, *, prompts: bool = False):
        self.label, self.asks = str(directory), prompts
        self.tokenizer = _tokenizer(directory)
        self.max_length = _max_length(settings.get("max_length"), self.tokenizer, positions)
        self.padding = settings.get("padding", "batch")
        if self.padding not in ("batch", "max_length"):
            raise ConfigError(f"modelpool.padding={shown(self.padding)!r}: wanted batch or max_length.")
        self.recipe = self._recipe()  # now: a tokenizer's state changes when it is used

    def tokens(self, texts: Texts, track: Track, description: str) -> dict[str, Tensor]:
        """int32 (N, length) for each argument of the model, `length` being that of the longest text, or max_length."""
        encoded, options = [], {"truncation": True, "max_length": self.max_length, "padding": False}
        with track(description, len(texts)) as advance:
            for start in range(0, len(texts), _BATCH):
                stop = start + _BATCH
                rows = [texts.prompts(start, stop)] if self.asks else texts.rows(start, stop)
                encoded.append(self.tokenizer(*rows, **options))
                advance(len(rows[0]))
        longest = max((len(ids) for part in encoded for ids in part["input_ids"]), default=0)
        length = self.max_length if self.padding == "max_length" else longest
        found = {name: [row for part in encoded for row in part[name]] for name in (encoded[0] if encoded else ())}
        pads = {"input_ids": self.tokenizer.pad_token_id}
        return {name: _padded(rows, length, pads.get(name, 0)) for name, rows in found.items()}

    def trim(self) -> "Trim":
        """What a batch goes through before the model."""
        return Trim(self.padding == "batch")

    def _recipe(self) -> str:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        words = backend.to_str() if backend is not None else self.tokenizer.get_vocab()
        libraries = {name: version(name) for name in ("tokenizers", "transformers")}
        return json.dumps([words, self.max_length, self.padding, self.asks, libraries], sort_keys=True)


class Trim(nn.Module):
    """Token ids with their mask as the model takes them: without columns in which every text of the batch is padded."""

    def __init__(self, trims: bool):
        super().__init__()
        self.trims = trims

    def forward(self, **tokens: Tensor) -> dict[str, Tensor]:
        if not self.trims or "attention_mask" not in tokens:
            return tokens
        length = int(tokens["attention_mask"].sum(1).max())
        return {name: tensor[:, :length] for name, tensor in tokens.items()}


def _tokenizer(directory: Path) -> Any:
    with quiet():
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        except Exception as error:  # a tokenizer's files fail in any way they like
            raise CheckpointError(f"'{directory}' has no usable tokenizer: {one_line(error)}") from error
    if tokenizer.pad_token_id is None:
        raise CheckpointError(f"The tokenizer of '{directory}' has no token to pad with; give it a pad_token.")
    tokenizer.padding_side = "right"
    return tokenizer


def _max_length(asked: Any, tokenizer: Any, positions: int | None) -> int:
    most = min(tokenizer.model_max_length, positions or _LONGEST)
    if asked is None:
        return min(most, _LONGEST)
    if not isinstance(asked, int) or isinstance(asked, bool) or asked < 1:
        raise ConfigError(f"modelpool.max_length={shown(asked)!r}: wanted a number of tokens.")
    if positions is not None and asked > positions:
        raise ConfigError(f"modelpool.max_length={asked}, but the model has {positions} positions. Remedy: give less.")
    return asked


def _padded(rows: list[list[int]], length: int, pad: int) -> Tensor:
    out = torch.full((len(rows), length), pad, dtype=torch.int32)
    for into, row in zip(out, rows, strict=True):
        into[: len(row)] = torch.tensor(row, dtype=torch.int32)
    return out
