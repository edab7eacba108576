"""T5 and related models as classifiers: each class name is scored by its first token at the decoder's first step.

A task's template turns its texts into a prompt. The feature is the decoder's hidden state at its first position, and
the head is the output layer's rows for the first token of each class name, so the logits are the model's own. If greedy
decoding spells a class name, that class has the highest score here. The converse need not hold, so accuracy is at least
that of an exact match. https://arxiv.org/abs/1910.10683, https://arxiv.org/abs/2210.11416
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import cached_property
from itertools import islice
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from suture.checkpoints import Checkpoint
from suture.core.head import Head
from suture.core.progress import Track, untracked
from suture.errors import CheckpointError, ConfigError, SutureError
from suture.families.shared.base import Encoder, Family
from suture.families.shared.models import Naming, build, config_of, copy_into, tied_names, without_memory
from suture.families.shared.spelling import spelling_of
from suture.families.shared.texts import SETTINGS, TextReader
from suture.tasks.base import Task

_PARTS = ("shared", "encoder", "decoder", "lm_head")


class FirstStep(Encoder):
    """A T5's encoder and one step of its decoder: tokens (B, L) with their mask → hidden states (B, D).

    The output layer is included so that names match, but no input reaches it.
    """

    encoder: nn.Module
    decoder: nn.Module

    def __init__(self, model: Any, prepare: nn.Module, start: int, naming: Naming):
        super().__init__()
        for part in _PARTS:
            self.add_module(part, getattr(model, part))
        self.prepare = prepare
        self._start, self._naming = start, naming

    def forward(self, **tokens: Tensor) -> Tensor:
        tokens = self.prepare(**tokens)
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        hidden = self.encoder(input_ids=ids, attention_mask=mask)[0]
        first = torch.full((len(ids), 1), self._start, dtype=torch.long, device=ids.device)
        context = {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}
        return self.decoder(input_ids=first, use_cache=False, **context)[0][:, 0]

    def load(self, state: Mapping[str, Tensor]) -> "FirstStep":
        """Copy in the weights of another model of this architecture; raises `CheckpointError` if they do not fit."""
        copy_into(self, state, self._naming)
        return self


class Seq2Seq(Family):
    """A T5 directory with its tokenizer; experts are whole models or LoRA adapters.

    Settings: `max_length` and `padding`, see `TextReader`. A task's head comes from its expert's output layer.
    """

    name = "seq2seq"
    architectures = ("ForConditionalGeneration",)
    reads: ClassVar[Literal["pictures", "texts"]] = "texts"
    known_settings = SETTINGS

    def canonical_names(self, names: Iterable[str]) -> dict[str, str]:
        """Name in the model → stored name; tied tensors count under their first name, whichever of them are stored."""
        stored_names: dict[str, str] = {}
        for stored in names:
            name = self._spelling(stored)
            first = self._tied.get(name)
            if first is not None and (first == name or first not in stored_names):
                stored_names[first] = stored
        return stored_names

    def encoder(self, state: Mapping[str, Tensor] | None = None) -> FirstStep:
        return deepcopy(self._encoder).load(self.weights if state is None else state)

    @cached_property
    def reader(self) -> TextReader:
        """The model's tokenizer, applied to the prompts that a task's template makes."""
        return TextReader(self.directory, self.settings, None, prompts=True)

    def head(self, task: Task, track: Track = untracked) -> Head:
        if problems := self.problems(task):
            raise ConfigError(problems[0])
        state = self.experts.get(task.expert, self.weights)
        stored = self.canonical_names(state)
        output = stored.get("lm_head.weight") or stored["shared.weight"]  # tied to the embeddings in the first T5s
        return Head(state[output][self._first_tokens(task)].float(), scale=self._scale)

    def problems(self, task: Task) -> list[str]:
        if problems := super().problems(task):
            return problems
        if len(task.templates) != 1:
            column = (task.text_columns or ("text",))[0]
            problem = f"Task {task.name!r} has {len(task.templates)} templates"
            return [f"{problem}; give one, which asks for a class: \"Is '{{{column}}}' …?\"."]
        try:
            tokens = self._first_tokens(task)
        except SutureError as error:
            return [str(error)]
        return list(islice(self._token_problems(task, tokens), 1))

    def _token_problems(self, task: Task, tokens: Sequence[int]) -> Iterator[str]:
        for token, name in zip(tokens, task.classnames, strict=True):
            first = task.classnames[tokens.index(token)]
            if first != name:
                problem = f"Task {task.name!r}: the class names {first!r} and {name!r} begin with the same token"
                yield f"{problem}, so the first step cannot tell them apart. Remedy: give other words."
            if token == self.reader.tokenizer.unk_token_id:
                yield f"Task {task.name!r}: the class name {name!r} is no word of the tokenizer. Remedy: give another."

    def saved_part(self, base: Checkpoint) -> Checkpoint:
        """The whole model, with tied tensors under one name."""
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
        """The architecture on the meta device, without memory for weights."""
        return without_memory(self._config, self._model)

    @cached_property
    def _tied(self) -> dict[str, str]:
        return tied_names(self._skeleton)

    @cached_property
    def _spelling(self) -> Any:
        return spelling_of(self._skeleton)

    @cached_property
    def _encoder(self) -> FirstStep:
        def naming(names: Iterable[str]) -> dict[str, str]:  # a bound method would be deep-copied with the encoder
            return self.canonical_names(names)

        model = self._model()
        return FirstStep(model, self.reader.trim(), self._start, naming).eval().requires_grad_(False)

    @property
    def _start(self) -> int:
        start = self._config.decoder_start_token_id
        return self._config.pad_token_id if start is None else start

    @cached_property
    @torch.no_grad()
    def _scale(self) -> float:
        """The model's factor on hidden states before its output layer, 1 or 1/√width, measured by running it."""
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
        tokens = self.reader.tokenizer(list(task.classnames), add_special_tokens=False)["input_ids"]
        if empty := [name for name, ids in zip(task.classnames, tokens, strict=True) if not ids]:
            raise ConfigError(f"Task {task.name!r}: the class name {empty[0]!r} has no token. Remedy: give a word.")
        return [ids[0] for ids in tokens]


FAMILY = Seq2Seq
