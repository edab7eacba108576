"""Causal language models: any `AutoModelForCausalLM`, whole models and adapters, scored as the field scores them.

Everything is merged. A task's `score` says how it is scored: see `suture.tasks.scoring`. The feature is the last hidden
state, and logits are made by the output layer of the model that is scored, not by an expert's.
"""

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from suture.checkpoints import Checkpoint, open_checkpoint
from suture.checkpoints.file_names import with_stacks
from suture.checkpoints.tokenizers import mixed_tokens
from suture.core.head import Head
from suture.core.progress import Track, untracked
from suture.errors import CheckpointError, SutureError, shown
from suture.families.shared.base import Family
from suture.families.shared.models import build, config_of, first_names, tied_names, without_memory
from suture.families.shared.next_token import NextToken
from suture.families.shared.prompts import PromptReader
from suture.families.shared.requests import Requests
from suture.families.shared.spelling import spelling_of
from suture.tasks import Passage, Split, Task, passages

_CODE = "*.py"
_SETTINGS = frozenset({"max_length", "learn_on", "companions", "copy_code"})


class CausalLM(Family):
    """A directory of a causal language model with its tokenizer; experts are whole models or adapters.

    Settings: `max_length`, the tokens of a context, by default the model's; `learn_on`, whether AdaMerging looks at the
    `last` token of each prompt or at `all`; `companions`, a directory whose processor, chat template and generation
    files are copied into the merged model instead of the pretrained one's; `copy_code: true` copies its Python files
    too, which are never run.
    """

    name = "causal_lm"
    architectures = ("ForCausalLM", "LMHeadModel")
    reads: ClassVar[Literal["pictures", "texts"]] = "texts"
    known_settings = _SETTINGS

    @cached_property
    def weights(self) -> Checkpoint:  # type: ignore[override]
        """All tensors of the pretrained model, by their stored names; experts that are stored apart as stacks."""
        return self.in_memory(open_checkpoint(super().weights))

    def in_memory(self, checkpoint: Checkpoint) -> Checkpoint:
        """A model with its experts as stacks, where `transformers` stacks them when it loads them."""
        return with_stacks(checkpoint, lambda name: self._spelling(name) in self._tied)

    def canonical_names(self, names: Iterable[str]) -> dict[str, str]:
        """Name in the model → stored name; tied tensors count under their first name, whichever of them are stored."""
        stored_names: dict[str, str] = {}
        for stored in names:
            first = self._tied.get(self._spelling(stored))
            if first is not None and (first == self._spelling(stored) or first not in stored_names):
                stored_names[first] = stored
        return stored_names

    def encoder(self, state: Mapping[str, Tensor] | None = None) -> NextToken:
        given = self.in_memory(state) if isinstance(state, Checkpoint) else state
        return deepcopy(self._encoder).load(self.weights if given is None else given)

    @cached_property
    def reader(self) -> PromptReader:  # type: ignore[override]
        """The model's tokenizer."""
        return PromptReader(self.directory, self.settings, getattr(self._text_config, "max_position_embeddings", None))

    def head(self, task: Task, track: Track = untracked) -> Head:
        """The output layer of the task's expert; scores use that of the model itself."""
        state = self.experts.get(task.expert, self.weights)
        name = f"{self._encoder._output}.weight"
        stored = self.canonical_names(state)[self._tied[name]]
        return Head(state[stored].float(), scale=self._encoder.scale)

    def language_inputs(self, task: Task, rows: Sequence[Passage]) -> tuple[dict[str, Tensor], Requests]:
        """The unlabelled prompts of a task, and what is asked to score it."""
        return self.reader.unlabelled(task, rows, task.name), self.reader.requests(task, rows)

    def problems(self, task: Task) -> list[str]:
        """Everything about a task, the tokenizer and the experts' tokenizers that would fail later."""
        if task.score is None:
            remedy = "score: bits_per_byte, acc_norm or exact_match"
            return [f"Task {task.name!r} has no score, but family={self.name} needs one. Remedy: {remedy}."]
        wrong = [*self._setting_problems(), *self._missing_tensors(), *self._reader_problems()]
        if problems := wrong or self._tokenizer_problems():
            return problems
        try:
            split: Split = "test"
            rows = passages(task, split)
            self.reader.requests(task, rows)
        except SutureError as error:
            return [str(error)]
        return []

    def _setting_problems(self) -> list[str]:
        if self.settings.get("learn_on", "last") not in ("last", "all"):
            return [f"modelpool.learn_on={shown(self.settings['learn_on'])!r}: wanted last or all."]
        folder = self.settings.get("companions")
        if folder is not None and not Path(str(folder)).expanduser().is_dir():
            return [f"modelpool.companions='{shown(folder)}' is no folder. Remedy: name a model's directory."]
        return []

    def _missing_tensors(self) -> list[str]:
        """The first tensor that the architecture has and the pretrained model does not."""
        there = self.canonical_names(self.weights)
        missing = [name for name in first_names(self._skeleton) if name not in there]
        if not missing:
            return []
        found = f"'{missing[0]}' and {len(missing) - 1} more are" if missing[1:] else f"'{missing[0]}' is"
        remedy = "suture merge, which needs no architecture, or save the model again with the installed transformers"
        return [f"{found} missing from '{self.directory}', which has other names. Remedy: {remedy}."]

    def _tokenizer_problems(self) -> list[str]:
        """Experts whose tokens stand in other rows than the pretrained model's."""
        rows = self._skeleton.get_input_embeddings().weight.shape[0]
        return mixed_tokens(self.weights, self.experts, rows)  # type: ignore[arg-type]

    def merged_logits(self) -> Callable[[Any, Any, str], Tensor]:
        """Logits of the next token after each prompt, or with `learn_on: all` after each of its tokens, not padding."""
        every = self.settings.get("learn_on", "last") == "all"

        def logits(module: Any, inputs: Any, task: str) -> Tensor:
            scored = {"scored": inputs["attention_mask"].bool()} if every else {}
            return module.next_token_logits(module(**inputs, **scored))

        return logits

    def saved_part(self, base: Checkpoint) -> Checkpoint:
        """The whole model, with tied tensors under one name."""
        return base.select({stored: stored for stored in self._kept(base)})

    def _kept(self, base: Checkpoint) -> list[str]:
        merged = set(self.canonical_names(base).values())
        return [stored for stored in base if stored in merged or self._spelling(stored) not in self._tied]

    def complete(self, out: Path) -> None:
        """Add the files that a model needs beside its weights, from the pretrained model or from `companions`."""
        super().complete(out)
        named = self.settings.get("companions")
        source = Path(str(named)).expanduser() if named else self.directory
        patterns = ["*.json", "*.jinja", "*.model", "*.txt", *([_CODE] if self.settings.get("copy_code") else [])]
        files = [path for pattern in patterns for path in sorted(source.glob(pattern))]
        for path in files:
            if path.name != "config.json" and not path.name.endswith(".index.json"):
                shutil.copyfile(path, out / path.name)

    @cached_property
    def _config(self) -> Any:
        return config_of(self.directory)

    @property
    def _text_config(self) -> Any:
        return self._config.get_text_config()

    def _model(self) -> Any:
        model = build(_auto_of(self._config), self._config, self.name, self.directory)
        if model.get_output_embeddings() is None or not hasattr(model, model.base_model_prefix):
            kind = type(model).__name__
            raise CheckpointError(f"'{self.directory}' is a {kind}, without a base model and an output layer.")
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
    def _encoder(self) -> NextToken:
        def naming(names: Iterable[str]) -> dict[str, str]:  # a bound method would be deep-copied with the encoder
            return self.canonical_names(names)

        model = self._model()
        scale, softcap = _measured(model, self._text_config, str(self.directory))
        return NextToken(model, naming, scale, softcap).eval().requires_grad_(False)


def _auto_of(config: Any) -> str:
    """The class that builds a configuration's model: of causal language models, else of those that also see."""
    from transformers.models.auto import modeling_auto as known

    language = config.model_type in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    sees = config.model_type in known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return "AutoModelForImageTextToText" if sees and not language else "AutoModelForCausalLM"


@torch.no_grad()
def _measured(model: Any, config: Any, label: str) -> tuple[float, float | None]:
    """The factor and the cap on logits with which the encoder gives the model's own, measured by running it."""
    tokens = {"input_ids": torch.tensor([[1, 0, 1]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    logits = model(**tokens).logits
    softcap = getattr(config, "final_logit_softcapping", None)
    encoder = NextToken(model, lambda names: {}, 1.0, None)
    rows = encoder(**tokens, scored=torch.ones(1, 3, dtype=torch.bool))
    linear = encoder.next_token_logits(rows)
    raw = softcap * torch.atanh((logits[0] / softcap).double()).float() if softcap else logits[0]
    scale = float((raw * linear).sum() / (linear * linear).sum())
    scale = 1.0 if abs(scale - 1) < 1e-4 else scale
    encoder.scale, encoder.softcap = scale, softcap
    if not torch.allclose(encoder.next_token_logits(rows), logits[0], rtol=1e-3, atol=1e-4):
        raise CheckpointError(f"'{label}' makes its logits in a way that family=causal_lm does not know.")
    return scale, softcap


FAMILY = CausalLM
