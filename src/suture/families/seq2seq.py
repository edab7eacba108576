"""T5 and its relatives asked in words: a class is a word, scored by the decoder's first step.

A task's template makes a prompt of its texts. The feature is the decoder's hidden state at its first position, and the
head are the rows of the output layer for the first token of each class name, so their logits are the model's own. Where
greedy decoding spells a class name, that class has the largest score here; the converse need not hold, so accuracy is
at least that of an exact match. https://arxiv.org/abs/1910.10683, https://arxiv.org/abs/2210.11416
"""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from suture.checkpoints import Checkpoint
from suture.core.head import Head
from suture.core.progress import Track, untracked
from suture.errors import CheckpointError, ConfigError, SutureError
from suture.families.shared.base import Encoder, Family
from suture.families.shared.models import Naming, build, config_of, copy_into, tied_names
from suture.families.shared.spelling import spelling_of
from suture.families.shared.texts import SETTINGS, TextReader
from suture.tasks.base import Task

_PARTS = ("shared", "encoder", "decoder", "lm_head")


class FirstStep(Encoder):
    """A T5's encoder and one step of its decoder: tokens (B, L) with their mask → hidden states (B, D).

    The output layer is held too, so that names fit; no input reaches it.
    """

    encoder: nn.Module
    decoder: nn.Module

    def __init__(self, model: Any, prepare: nn.Module, start: int, naming: Naming):
        super().__init__()
        for part in _PARTS:
            self.add_module(part, getattr(model, part))
        self.prepare, self._start, self._naming = prepare, start, naming

    def forward(self, **tokens: Tensor) -> Tensor:
        tokens = self.prepare(**tokens)
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        hidden = self.encoder(input_ids=ids, attention_mask=mask)[0]
        first = torch.full((len(ids), 1), self._start, dtype=torch.long, device=ids.device)
        read = {"encoder_hidden_states": hidden, "encoder_attention_mask": mask, "use_cache": False}
        return self.decoder(input_ids=first, **read)[0][:, 0]

    def load(self, state: Mapping[str, Tensor]) -> "FirstStep":
        """Copy the weights of another model of this architecture in, in place; raises `CheckpointError`."""
        copy_into(self, state, self._naming)
        return self


class Seq2Seq(Family):
    """A T5 directory with its tokenizer; experts are whole models or LoRA adapters.

    Settings: `max_length` and `padding`, see `TextReader`. The output layer of a task's head is its expert's.
    """

    name = "seq2seq"
    reads: ClassVar[Literal["pictures", "texts"]] = "texts"
    known_settings = SETTINGS

    def canonical_names(self, names: Iterable[str]) -> dict[str, str]:
        """Name in the model → stored name; of tied tensors the first name alone, whichever of them are stored."""
        found: dict[str, str] = {}
        for stored in names:
            name = self._spelling(stored)
            first = self._tied.get(name)
            if first is not None and (first == name or first not in found):
                found[first] = stored
        return found

    def encoder(self, state: Mapping[str, Tensor] | None = None) -> FirstStep:
        return deepcopy(self._encoder).load(self.weights if state is None else state)

    @cached_property
    def reader(self) -> TextReader:
        """The model's tokenizer, on the prompts that a task's template makes."""
        return TextReader(self.directory, self.settings, None, prompts=True)

    def head(self, task: Task, track: Track = untracked) -> Head:
        if problems := self.problems(task):
            raise ConfigError(problems[0])
        state = self.experts.get(task.name, self.weights)
        stored = self.canonical_names(state)
        output = stored.get("lm_head.weight") or stored["shared.weight"]  # tied to the embeddings in the first T5s
        return Head(state[output][self._first_tokens(task)].float(), scale=self._scale)

    def problems(self, task: Task) -> list[str]:
        found = super().problems(task)
        if found:
            return found
        if len(task.templates) != 1:
            told = f"Task {task.name!r} has {len(task.templates)} templates"
            return [f"{told}; give one, which asks for a class: \"Is '{{{(task.text_columns or ('text',))[0]}}}' …?\"."]
        try:
            tokens = self._first_tokens(task)
        except SutureError as error:
            return [str(error)]
        for i, token in enumerate(tokens):
            one, other = task.classnames[tokens.index(token)], task.classnames[i]
            if one != other:
                told = f"Task {task.name!r}: the class names {one!r} and {other!r} begin with the same token"
                return [f"{told}, so the first step cannot tell them apart. Remedy: give other words."]
            if token == self.reader.tokenizer.unk_token_id:
                return [
                    f"Task {task.name!r}: the class name {other!r} is no word of the tokenizer. Remedy: give another."
                ]
        return []

    def kept(self, base: Checkpoint) -> Checkpoint:
        """All of it, tied tensors under one name."""
        return base.select({stored: stored for stored in self.canonical_names(base).values()})

    @cached_property
    def _config(self) -> Any:
        return config_of(self.directory)

    def _model(self) -> Any:
        model = build("AutoModelForSeq2SeqLM", self._config, self.name, self.directory)
        if missing := [part for part in _PARTS if not isinstance(getattr(model, part, None), nn.Module)]:
            kind = type(model).__name__
            raise CheckpointError(f"'{self.directory}' is a {kind}, which has no {missing[0]}; wanted a T5 or alike.")
        return model

    @cached_property
    def _skeleton(self) -> Any:
        """The architecture without memory."""
        config = self._config  # read outside of the block
        assert config is not None
        with torch.device("meta"):
            return self._model()

    @cached_property
    def _tied(self) -> dict[str, str]:
        return tied_names(self._skeleton)

    @cached_property
    def _spelling(self) -> Any:
        return spelling_of(self._skeleton)

    @cached_property
    def _encoder(self) -> FirstStep:
        naming = lambda names: self.canonical_names(names)  # a function: a copy of the encoder must not copy its family
        model = self._model()
        return FirstStep(model, self.reader.trim(), self._start, naming).eval().requires_grad_(False)

    @property
    def _start(self) -> int:
        found = self._config.decoder_start_token_id
        return self._config.pad_token_id if found is None else found

    @cached_property
    @torch.no_grad()
    def _scale(self) -> float:
        """What the model multiplies hidden states with before its output layer: 1, or 1/√width, seen by running it."""
        model = self._model()
        encoder = FirstStep(model, self.reader.trim(), self._start, lambda names: {})
        tokens = {"input_ids": torch.tensor([[1, 0]]), "attention_mask": torch.ones(1, 2, dtype=torch.long)}
        logits = model(**tokens, decoder_input_ids=torch.tensor([[self._start]])).logits[:, 0]
        rows = encoder(**tokens)
        for scale in (1.0, self._config.d_model**-0.5):
            if torch.allclose(model.lm_head(scale * rows), logits, rtol=1e-4, atol=1e-5):
                return scale
        raise CheckpointError(f"'{self.directory}' makes its logits in a way that family={self.name} does not know.")

    def _first_tokens(self, task: Task) -> list[int]:
        words = self.reader.tokenizer(list(task.classnames), add_special_tokens=False)["input_ids"]
        if empty := [name for name, ids in zip(task.classnames, words, strict=True) if not ids]:
            raise ConfigError(f"Task {task.name!r}: the class name {empty[0]!r} has no token. Remedy: give a word.")
        return [ids[0] for ids in words]


FAMILY = Seq2Seq
