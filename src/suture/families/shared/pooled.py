"""Text encoders without a head: the backbone is merged, its last hidden states are pooled into one feature."""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from suture.checkpoints import Checkpoint
from suture.core.head import Head
from suture.core.progress import Track, untracked
from suture.errors import ConfigError, SutureError, shown
from suture.families.shared.base import Encoder, Family
from suture.families.shared.heads import save_heads, stored_head
from suture.families.shared.models import Naming, build, config_of, copy_into, without_memory
from suture.families.shared.spelling import spelling_of
from suture.families.shared.texts import SETTINGS, TextReader
from suture.tasks.base import Task

_POOLER = "pooler."  # a layer of some architectures that nothing here reads, and that checkpoints may lack


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)


def _mean_sqrt(hidden: Tensor, mask: Tensor) -> Tensor:
    return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1).sqrt()


def _weighted_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Later tokens count more: the weight of the i-th, from 1, is i (https://arxiv.org/abs/2202.08904, eq. 1)."""
    weights = mask * torch.arange(1, hidden.shape[1] + 1, device=hidden.device).view(1, -1, 1)
    return _mean(hidden, weights)


def _largest(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden.masked_fill(mask == 0, float("-inf")).amax(1)


def _first(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden[:, 0]


def _last(hidden: Tensor, mask: Tensor) -> Tensor:
    rows = torch.arange(len(hidden), device=hidden.device)
    return hidden[rows, mask[..., 0].sum(1).long().clamp(min=1) - 1]


#: Name → function of hidden states (B, L, D) and their mask (B, L, 1); texts are padded on the right.
POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": _first,
    "max": _largest,
    "mean": _mean,
    "mean_sqrt_len": _mean_sqrt,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}


class PooledEncoder(Encoder):
    """A base model and its pooling: tokens (B, L) with their mask → features (B, D), several poolings side by side."""

    def __init__(self, prefix: str, model: nn.Module, prepare: nn.Module, poolings: tuple[str, ...], naming: Naming):
        super().__init__()
        self.add_module(prefix, model)
        self.prepare = prepare
        self._prefix, self._poolings, self._naming = prefix, poolings, naming

    def forward(self, **tokens: Tensor) -> Tensor:
        tokens = self.prepare(**tokens)
        hidden = self.get_submodule(self._prefix)(**tokens)[0]
        mask = tokens["attention_mask"][..., None].to(hidden.dtype)
        return torch.cat([POOLINGS[name](hidden, mask) for name in self._poolings], dim=-1)

    def load(self, state: Mapping[str, Tensor]) -> "PooledEncoder":
        """Copy in the weights of another backbone; raises `CheckpointError` if they do not fit."""
        copy_into(self, state, self._naming)
        return self


class PooledTexts(Family):
    """A model directory with its tokenizer; experts are the same backbone, fine-tuned.

    Settings: `max_length` and `padding`, see `TextReader`; `pooling`, one of `POOLINGS` or several, by default the
    mean; `heads`, a mapping task → file of a linear layer.
    """

    reads: ClassVar[Literal["pictures", "texts"]] = "texts"
    known_settings = SETTINGS | {"heads", "pooling"}

    def canonical_names(self, names: Iterable[str]) -> dict[str, str]:
        """Name with the prefix of the architecture's base model → stored name, which may be without it."""
        prefix, stored_names = f"{self._prefix}.", {}
        for stored in names:
            bare = self._spelling(stored.removeprefix(prefix))
            stored_names |= {prefix + bare: stored} if bare in self._all_names else {}
        return stored_names

    def encoder(self, state: Mapping[str, Tensor] | None = None) -> PooledEncoder:
        return deepcopy(self._encoder).load(self.weights if state is None else state)

    @cached_property
    def reader(self) -> TextReader:
        """The model's tokenizer."""
        return TextReader(self.directory, self.settings, getattr(self.config, "max_position_embeddings", None))

    @property
    def poolings(self) -> tuple[str, ...]:
        """The poolings whose results make the feature, side by side."""
        given = self.settings.get("pooling", "mean")
        names = tuple(given) if isinstance(given, list | tuple) else (given,)
        if not names or not all(isinstance(name, str) and name in POOLINGS for name in names):
            raise ConfigError(f"modelpool.pooling={shown(given)!r}: wanted {', '.join(POOLINGS)}, or a list of these.")
        return names

    def head(self, task: Task, track: Track = untracked) -> Head:
        """The linear layer in the task's file."""
        return stored_head(self.settings.get("heads") or {}, task.name, len(task.classnames))

    def problems(self, task: Task) -> list[str]:
        if problems := [*super().problems(task), *self._missing()]:
            return problems
        try:
            head, width = self.head(task), self._feature_width
        except SutureError as error:
            return [str(error)]
        return self._width_problems(task, head, width)

    def _width_problems(self, task: Task, head: Head, width: int) -> list[str]:
        if head.before is not None or head.weights.shape[1] == width:
            return []
        problem = f"The head of task {task.name!r} takes {head.weights.shape[1]} numbers but the feature has {width}"
        return [f"{problem}. Remedy: give a head for this backbone and this pooling."]

    def _missing(self) -> list[str]:
        named = set(self.canonical_names(self.weights))
        floating = {name for name, tensor in self._skeleton.state_dict().items() if tensor.is_floating_point()}
        missing = sorted(f"{self._prefix}.{name}" for name in floating & self._all_names)
        missing = [name for name in missing if name not in named]
        label = getattr(self.weights, "label", self.directory)
        return [f"'{missing[0]}' is missing from '{label}'; wanted the weights of its config.json."] if missing else []

    def saved_part(self, base: Checkpoint) -> Checkpoint:
        """The backbone alone, for `AutoModel`: under its stored names without a prefix."""
        stored_names, prefix = self.canonical_names(base).values(), f"{self._prefix}."
        return base.select({stored.removeprefix(prefix): stored for stored in stored_names})

    def complete(self, out: Path) -> None:
        """Add configuration, tokenizer and, in `heads/`, the tasks' linear layers."""
        super().complete(out)
        self.write_heads(out, {name: stored_head(self.settings["heads"], name) for name in self._with_files()})

    def write_heads(self, out: Path, heads: Mapping[str, Head]) -> bool:
        if not self._with_files():
            return False
        save_heads(out, heads)
        return True

    def _with_files(self) -> tuple[str, ...]:
        return tuple(self.settings.get("heads") or ())

    @cached_property
    def config(self) -> Any:
        """The pretrained model's configuration; raises `CheckpointError` if it cannot be read."""
        return config_of(self.directory)

    @cached_property
    def _feature_width(self) -> int:
        """The feature's width, by encoding one token."""
        tokens = {"input_ids": torch.ones(1, 2, dtype=torch.long), "attention_mask": torch.ones(1, 2).long()}
        with torch.no_grad():
            return self._encoder(**tokens).shape[1]

    def _model(self) -> Any:
        return build("AutoModel", self.config, self.name, self.directory)

    @cached_property
    def _skeleton(self) -> Any:
        """The architecture on the meta device, without memory for weights."""
        return without_memory(self.config, self._model)

    @property
    def _prefix(self) -> str:
        return self._skeleton.base_model_prefix

    @cached_property
    def _spelling(self) -> Callable[[str], str]:
        return spelling_of(self._skeleton)

    @cached_property
    def _has_pooler(self) -> bool:
        return any(name.removeprefix(f"{self._prefix}.").startswith(_POOLER) for name in self.weights)

    @cached_property
    def _all_names(self) -> set[str]:
        """Names in the base model, without its pooler where the pretrained weights have none."""
        names = self._skeleton.state_dict()
        return {name for name in names if self._has_pooler or not name.startswith(_POOLER)}

    @cached_property
    def _encoder(self) -> PooledEncoder:
        def naming(names: Iterable[str]) -> dict[str, str]:  # a bound method would be deep-copied with the encoder
            return self.canonical_names(names)

        model = self._model()
        if not self._has_pooler and getattr(model, "pooler", None) is not None:
            model.pooler = None
        encoder = PooledEncoder(self._prefix, model, self.reader.trim(), self.poolings, naming)
        return encoder.eval().requires_grad_(False)
