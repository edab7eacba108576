"""Texts to token ids, with the tokenizers of `transformers`; an input is one text or a pair."""

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
_UNLIMITED = 10**9  # tokenizers without a limit name a larger number
_LONGEST = 512  # tokens, where neither the settings nor the model give a limit


class TextReader:
    """Tokenizes texts, or the prompts that their template makes of them, and pads them on the right.

    Settings: `max_length`, the tokens after which texts are cut (by default the model's limit, at most 512), and
    `padding`: "batch" pads to the longest text of a batch, "max_length" always to that length.
    """

    def __init__(self, directory: Path, settings: Any, positions: int | None, *, prompts: bool = False):
        self.label, self.prompts = str(directory), prompts
        self.tokenizer = load_tokenizer(directory)
        self.max_length = _max_length(settings.get("max_length"), self.tokenizer, positions)
        self.padding = settings.get("padding", "batch")
        if self.padding not in ("batch", "max_length"):
            raise ConfigError(f"modelpool.padding={shown(self.padding)!r}: wanted batch or max_length.")
        self.preprocessing = self._describe()  # before its first use, which changes a tokenizer's state

    def tokens(self, texts: Texts, track: Track, description: str) -> dict[str, Tensor]:
        """Argument of the model → int32 (N, length); `length` is that of the longest text, or `max_length`."""
        encoded, options = [], {"truncation": True, "max_length": self.max_length, "padding": False}
        with track(description, len(texts)) as advance:
            for start in range(0, len(texts), _BATCH):
                stop = start + _BATCH
                rows = [texts.prompts(start, stop)] if self.prompts else texts.rows(start, stop)
                encoded.append(self.tokenizer(*rows, **options))
                advance(len(rows[0]))
        longest = max((len(ids) for part in encoded for ids in part["input_ids"]), default=0)
        length = self.max_length if self.padding == "max_length" else longest
        rows = {name: [row for part in encoded for row in part[name]] for name in (encoded[0] if encoded else ())}
        pads = {"input_ids": self.tokenizer.pad_token_id}
        return {name: padded(ids, length, pads.get(name, 0)) for name, ids in rows.items()}

    def trim(self) -> "Trim":
        """The module that cuts a batch's common padding off before the model."""
        return Trim(self.padding == "batch")

    def _describe(self) -> str:
        """Everything that determines the tokens beside the text, as JSON."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        tokenizer = backend.to_str() if backend is not None else self.tokenizer.get_vocab()
        libraries = {name: version(name) for name in ("tokenizers", "transformers")}
        return json.dumps([tokenizer, self.max_length, self.padding, self.prompts, libraries], sort_keys=True)


class Trim(nn.Module):
    """Token ids and their mask without the columns that are padding in every text of the batch."""

    def __init__(self, trims: bool):
        super().__init__()
        self.trims = trims

    def forward(self, **tokens: Tensor) -> dict[str, Tensor]:
        if not self.trims or "attention_mask" not in tokens:
            return tokens
        length = int(tokens["attention_mask"].sum(1).max())
        return {name: tensor[:, :length] for name, tensor in tokens.items()}


def load_tokenizer(directory: Path, *, end_pads: bool = False) -> Any:
    """The tokenizer of a model's directory; raises `CheckpointError` for one that is damaged or cannot pad."""
    with quiet():
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        except Exception as error:  # a damaged file can raise anything
            raise CheckpointError(f"'{directory}' has no usable tokenizer: {one_line(error)}") from error
    if tokenizer.pad_token_id is None and end_pads:  # padding is masked, so that any token will do
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token
    if tokenizer.pad_token_id is None:
        raise CheckpointError(f"The tokenizer of '{directory}' has no token to pad with. Remedy: give it a pad_token.")
    tokenizer.padding_side = "right"
    return tokenizer


def _max_length(length: Any, tokenizer: Any, positions: int | None) -> int:
    if length is None:
        return min(tokenizer.model_max_length, positions or _LONGEST, _LONGEST)
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise ConfigError(f"modelpool.max_length={shown(length)!r}: wanted a number of tokens.")
    if positions is not None and length > positions:
        raise ConfigError(f"modelpool.max_length={length}, but the model has {positions} positions. Remedy: give less.")
    return length


def model_length(length: Any, tokenizer: Any, positions: int | None) -> int:
    """The tokens of a language model's context: those given, or all that the model has."""
    if length is None:
        known = [n for n in (positions, tokenizer.model_max_length) if n is not None and n < _UNLIMITED]
        return min(known, default=2048)
    return _max_length(length, tokenizer, positions)


def padded(rows: list[list[int]], length: int, pad: int) -> Tensor:
    """Rows of numbers, padded on the right: int32 (N, length)."""
    out = torch.full((len(rows), length), pad, dtype=torch.int32)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = torch.tensor(row, dtype=torch.int32)
    return out
