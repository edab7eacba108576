"""Classification models of `transformers`: the backbone is merged, each task keeps its expert's head.

The backbone is what the library calls the base model (`bert.…`, `resnet.…`). All else of a fine-tuned model is its
head: a linear layer, after layers of its own in some architectures (RoBERTa's dense, DistilBERT's pre_classifier).
Canonical names are those that the modules of the classification model have today.
"""

import json
import logging
import os
import shutil
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from suture.checkpoints import Checkpoint, open_checkpoint, save_checkpoint
from suture.core.head import Head
from suture.core.progress import Track, untracked
from suture.errors import CheckpointError, ConfigError, SutureError
from suture.families.shared.base import Encoder, Family, companion_files
from suture.families.shared.models import build, config_of, copy_into
from suture.families.shared.pictures import quiet
from suture.families.shared.spelling import spelling_of
from suture.families.shared.taken_apart import Before, Parts, Pick, Rest, take_apart
from suture.tasks.base import Task

log = logging.getLogger(__name__)
_BACKBONE, _HEAD = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


class Backbone(Encoder):
    """A base model, with what prepares its inputs before it and the choice of its feature after it."""

    def __init__(self, prefix: str, model: nn.Module, prepare: nn.Module, pick: Pick, naming: Callable[..., Any]):
        super().__init__()
        self.add_module(prefix, model)
        self.prepare, self._prefix, self._pick, self._naming = prepare, prefix, pick, naming

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """Features (B, D)."""
        return self._pick(self.get_submodule(self._prefix)(**self.prepare(*inputs, **named)))

    def load(self, state: Mapping[str, Tensor]) -> "Backbone":
        """Copy the weights and statistics of another backbone in, in place; raises `CheckpointError`."""
        copy_into(self, state, self._naming)
        return self


class Classification(Family):
    """What the families of classification models share; each says which models, `auto`, and which inputs."""

    auto: ClassVar[str]

    @abstractmethod
    def prepare(self) -> nn.Module:
        """From a batch as it is kept to the keyword arguments of the model."""

    @abstractmethod
    def example(self) -> dict[str, Tensor]:
        """Two inputs to try a model with, as its keyword arguments."""

    def canonical_names(self, names: Iterable[str]) -> dict[str, str]:
        """Name in the classification model → stored name, for the tensors of the backbone."""
        found = {}
        for stored in names:
            name = self._spelling(stored)
            found |= {c: stored for c in (name, f"{self._prefix}.{name}") if c in self._backbone_names}
        return found

    def encoder(self, state: Mapping[str, Tensor] | None = None) -> Backbone:
        return deepcopy(self._encoder).load(self.weights if state is None else state)

    def head(self, task: Task, track: Track = untracked) -> Head:
        """That of the expert of the task's name."""
        if problems := self.problems(task):
            raise ConfigError(problems[0])
        rest = self._rest(task.name, len(task.classnames))
        last = rest.last_linear(self._parts.width)
        if last is None:
            raise CheckpointError(f"The head of '{task.name}' does not end in a linear layer; wanted one that does.")
        before, tried = Before(rest, last), torch.linspace(-1, 1, 2 * self._parts.width).view(2, -1)
        plain = torch.equal(before(tried), tried)
        return Head(last.weight.data, None if last.bias is None else last.bias.data, before=None if plain else before)

    def problems(self, task: Task) -> list[str]:
        found = super().problems(task)
        if missing := sorted(self._backbone_names - set(self.canonical_names(self.weights)) - self._counters):
            told = f"'{missing[0]}' is missing from '{getattr(self.weights, 'label', self.directory)}'"
            return [*found, f"{told}; wanted the weights that its config.json describes."]
        try:
            classes = self._classes(task.name)
        except SutureError as error:
            return [*found, str(error)]
        if classes == len(task.classnames):
            return found
        told = f"Task {task.name!r} has {len(task.classnames)} class names but the head of its model"
        return [*found, f"{told} has {classes} classes. Remedy: list a name for every class, in the head's order."]

    def kept(self, base: Checkpoint) -> Checkpoint:
        """The backbone alone, under the names that it was stored with."""
        within = lambda name: name if name.startswith(f"{self._prefix}.") else f"{self._prefix}.{name}"
        return base.select({within(stored): stored for stored in self.canonical_names(base).values()})

    def complete(self, out: Path) -> None:
        """Configuration and processor; and in `tasks/NAME` a whole model for each expert, on the backbone's file."""
        super().complete(out)
        for name in self.experts:
            try:
                classes = self._classes(name)
            except SutureError as error:  # of a model that no task asks for
                log.warning("The merged model gets no tasks/%s: %s", name, error)
                continue
            self._write_task(out, out / "tasks" / name, name, classes)

    @cached_property
    def config(self) -> Any:
        """The pretrained model's configuration; raises `CheckpointError`."""
        return config_of(self.directory)

    def _model(self, classes: int, config: Any) -> Any:
        return build(self.auto, config, self.name, self.directory, num_labels=classes)

    def _skeleton(self, classes: int) -> Any:
        config = self.config
        with torch.device("meta"):
            return self._model(classes, config)

    @cached_property
    def _two(self) -> Any:
        """The architecture with two classes, without memory."""
        return self._skeleton(2)

    @cached_property
    def _spelling(self) -> Callable[[str], str]:
        return spelling_of(self._two)

    @property
    def _prefix(self) -> str:
        return self._two.base_model_prefix

    @cached_property
    def _backbone_names(self) -> set[str]:
        return {f"{self._prefix}.{name}" for name in getattr(self._two, self._prefix).state_dict()}

    @cached_property
    def _counters(self) -> set[str]:
        """Tensors of whole numbers, which a checkpoint may lack."""
        return {name for name, tensor in self._two.state_dict().items() if not tensor.is_floating_point()}

    @cached_property
    def _head_shapes(self) -> dict[str, tuple[int | None, ...]]:
        """Name → shape of the tensors of a head, None standing for the number of classes."""
        two, three = self._two.state_dict(), self._skeleton(3).state_dict()
        shape = lambda name: tuple(
            a if a == b else None for a, b in zip(two[name].shape, three[name].shape, strict=True)
        )
        return {name: shape(name) for name in two if not name.startswith(f"{self._prefix}.")}

    @cached_property
    def _parts(self) -> Parts:
        return take_apart(self._model(2, self.config), self.example(), str(self.directory))

    @cached_property
    def _encoder(self) -> Backbone:
        naming = lambda names: self.canonical_names(names)  # a function: a copy of the encoder must not copy its family
        encoder = Backbone(self._prefix, self._parts.backbone, self.prepare(), self._parts.pick, naming)
        return encoder.eval().requires_grad_(False)

    def _head_tensors(self, name: str) -> dict[str, Tensor]:
        expert = self.experts[name]
        stored = {self._spelling(key): key for key in expert}
        return {key: expert[stored[key]] for key in self._head_shapes}

    def _classes(self, name: str) -> int:
        """How many classes an expert's head has, from headers; raises `SutureError` where there is no such head."""
        if name not in self.experts:
            found = ", ".join(self.experts) or "none"
            raise ConfigError(
                f"Task '{name}' has no model of its name, whose head would be its (found: {found}). "
                "Remedy: name a model and its task alike."
            )
        expert, classes = self.experts[name], set()
        stored = {self._spelling(key): key for key in expert}
        for key, wanted in self._head_shapes.items():
            if key not in stored:
                raise CheckpointError(f"'{key}' is missing from '{name}'; wanted a model with its classification head.")
            shape = expert.specs[stored[key]].shape
            if len(shape) != len(wanted) or any(b not in (a, None) for a, b in zip(shape, wanted, strict=True)):
                raise CheckpointError(f"'{key}' has shape {shape} in '{name}', which does not fit the base's config.")
            classes |= {a for a, b in zip(shape, wanted, strict=True) if b is None}
        if len(classes) != 1:
            raise CheckpointError(f"The head of '{name}' has no one number of classes (found: {sorted(classes)}).")
        return classes.pop()

    def _rest(self, name: str, classes: int) -> Rest:
        config, axes = self._own_config(name), self._parts.axes
        with torch.device("meta"):
            rest = Rest(self._model(classes, config), self._prefix, axes)
        rest.to_empty(device="cpu")
        state = rest.model.state_dict()
        for key, tensor in self._head_tensors(name).items():
            state[key].copy_(tensor)
        return rest.requires_grad_(False)

    def _own_config(self, name: str) -> Any:
        """An expert's configuration, or the pretrained model's where the expert is weights alone."""
        directory = self.experts[name].directory
        own = None if directory is None else config_of(directory)
        return own if own is not None and own.model_type == self.config.model_type else self.config

    def _write_task(self, out: Path, folder: Path, name: str, classes: int) -> None:
        """A sharded model: the backbone's file under a second name, and the head's."""
        folder.mkdir(parents=True)
        tensors = {key: tensor.contiguous() for key, tensor in self._head_tensors(name).items()}
        save_checkpoint(tensors, folder / _HEAD, metadata={"format": "pt"})
        _link(out / "model.safetensors", folder / _BACKBONE)
        files = dict.fromkeys(open_checkpoint(folder / _BACKBONE), _BACKBONE) | dict.fromkeys(tensors, _HEAD)
        total = sum((folder / file).stat().st_size for file in (_BACKBONE, _HEAD))
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
        config = deepcopy(self._own_config(name))
        config.num_labels, config.architectures = classes, [type(self._two).__name__]
        with quiet():
            config.save_pretrained(folder)
        for path in companion_files(self.directory):
            if path.name != "config.json":
                shutil.copyfile(path, folder / path.name)


def _link(file: Path, name: Path) -> None:
    try:
        os.link(file, name)
    except OSError:  # not on every file system
        shutil.copyfile(file, name)
