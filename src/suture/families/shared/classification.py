"""Classification models of `transformers`: the backbone is merged, and each task uses its expert's head.

The backbone is what the library calls the base model (`bert.…`, `resnet.…`). The rest of a fine-tuned model is its
head: a linear layer, in some architectures with layers before it (RoBERTa's dense, DistilBERT's pre_classifier).
Canonical names are the current names in the modules of the classification model.
"""

import json
import logging
import os
import shutil
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from suture import __version__
from suture.checkpoints import Checkpoint, open_checkpoint, save_checkpoint
from suture.core.head import Head
from suture.core.progress import Track, untracked
from suture.errors import CheckpointError, ConfigError, SutureError
from suture.families.shared.anatomy import Anatomy
from suture.families.shared.base import Encoder, Family, companion_files
from suture.families.shared.models import build, config_of, copy_into, without_memory
from suture.families.shared.pictures import quiet
from suture.families.shared.taken_apart import Before, Pick, Rest, Split, take_apart
from suture.storage.cache import digest
from suture.tasks.base import Task

log = logging.getLogger(__name__)
_BACKBONE, _HEAD = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


class Backbone(Encoder):
    """A base model between the module that prepares its inputs and the function that picks its feature."""

    def __init__(self, prefix: str, model: nn.Module, prepare: nn.Module, pick: Pick, naming: Callable[..., Any]):
        super().__init__()
        self.add_module(prefix, model)
        self.prepare = prepare
        self._prefix, self._pick = prefix, pick
        self._naming = naming

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """Features (B, D)."""
        return self._pick(self.get_submodule(self._prefix)(**self.prepare(*inputs, **named)))

    def load(self, state: Mapping[str, Tensor]) -> "Backbone":
        """Copy in the weights and statistics of another backbone; raises `CheckpointError` if they do not fit."""
        copy_into(self, state, self._naming)
        return self


class Classification(Family):
    """Base of the families of classification models: a subclass names its models (`auto`) and prepares its inputs."""

    auto: ClassVar[str]

    @abstractmethod
    def prepare(self) -> nn.Module:
        """A module that maps a cached batch to the keyword arguments of the model."""

    @abstractmethod
    def example(self) -> dict[str, Tensor]:
        """Two different inputs, as keyword arguments of the model."""

    def canonical_names(self, names: Iterable[str]) -> dict[str, str]:
        """Name in the classification model → stored name, for the tensors of the backbone."""
        stored_names, prefix, backbone = {}, self._prefix, self._anatomy.backbone
        for stored, name in self._anatomy.spelled(names).items():
            stored_names |= {c: stored for c in (name, f"{prefix}.{name}") if c in backbone}
        return stored_names

    def encoder(self, state: Mapping[str, Tensor] | None = None) -> Backbone:
        return deepcopy(self._encoder).load(self.weights if state is None else state)

    def head(self, task: Task, track: Track = untracked) -> Head:
        """The head of the expert that has the task's name."""
        if problems := self.problems(task):
            raise ConfigError(problems[0])
        rest, width = self._rest(task.expert, len(task.classnames)), self._split.width
        last = rest.last_linear(width)
        if last is None:
            raise CheckpointError(f"The head of '{task.name}' does not end in a linear layer; wanted one that does.")
        before, probe = Before(rest, last), torch.linspace(-1, 1, 2 * width).view(2, -1)
        only_linear = torch.equal(before(probe), probe)
        bias = None if last.bias is None else last.bias.data
        return Head(last.weight.data, bias, before=None if only_linear else before)

    def problems(self, task: Task) -> list[str]:
        return [*super().problems(task), *self._head_problems(task)]

    def _head_problems(self, task: Task) -> list[str]:
        known = self._anatomy
        if missing := sorted(known.backbone - set(self.canonical_names(self.weights)) - known.counters):
            problem = f"'{missing[0]}' is missing from '{getattr(self.weights, 'label', self.directory)}'"
            return [f"{problem}; wanted the weights that its config.json describes."]
        try:
            classes = self._classes(task.expert)
        except SutureError as error:
            return [str(error)]
        if classes == len(task.classnames):
            return []
        problem = f"Task {task.name!r} has {len(task.classnames)} class names but the head of its model"
        return [f"{problem} has {classes} classes. Remedy: list a name for every class, in the head's order."]

    def saved_part(self, base: Checkpoint) -> Checkpoint:
        """The backbone alone, under its stored names with the backbone's prefix."""
        prefix = f"{self._prefix}."
        stored_names = self.canonical_names(base).values()
        return base.select({prefix + stored.removeprefix(prefix): stored for stored in stored_names})

    def complete(self, out: Path) -> None:
        """Add configuration and processor, and in `tasks/NAME` a whole model per expert that shares the backbone."""
        super().complete(out)
        for name in self.experts:
            try:
                classes = self._classes(name)
            except SutureError as error:  # the expert belongs to no task
                log.warning("The merged model gets no tasks/%s: %s", name, error)
                continue
            self._write_task(out, out / "tasks" / name, name, classes)

    def write_heads(self, out: Path, heads: Mapping[str, Head]) -> bool:
        """Replace the last linear layers of the models in `tasks/NAME`."""
        for name, head in heads.items():
            rest = self._rest(name, self._classes(name))
            last, tensors = rest.last_linear(self._split.width), self._head_tensors(name)
            own: dict[Tensor, str] = {parameter: key for key, parameter in rest.model.named_parameters()}
            if last is None or (last.bias is None and head.bias is not None):
                raise ConfigError(f"The head of '{name}' has no linear layer with a bias; wanted one to replace.")
            new = {last.weight: head.weights} | ({} if head.bias is None else {last.bias: head.bias})
            for parameter, value in new.items():
                key = own[parameter]
                tensors[key] = value.detach().to(tensors[key]).view_as(tensors[key])
            stored = {key: tensor.contiguous() for key, tensor in tensors.items()}
            save_checkpoint(stored, out / "tasks" / name / _HEAD, metadata={"format": "pt"})
        return True

    @cached_property
    def config(self) -> Any:
        """The pretrained model's configuration; raises `CheckpointError` if it cannot be read."""
        return config_of(self.directory)

    def _model(self, classes: int, config: Any) -> Any:
        return build(self.auto, config, self.name, self.directory, num_labels=classes)

    def _skeleton(self, classes: int) -> Any:
        return without_memory(self.config, lambda: self._model(classes, self.config))

    @cached_property
    def _anatomy(self) -> Anatomy:
        """Names and shapes, by the bytes of config.json and the version of transformers."""
        versions = {name: version(name) for name in ("transformers", "torch")}
        files = [path for path in companion_files(self.directory) if path.name == "config.json"]
        return Anatomy(digest({}, files, self.auto, versions, __version__), self._skeleton)

    @property
    def _prefix(self) -> str:
        return self._anatomy.prefix

    @cached_property
    def _split(self) -> Split:
        return take_apart(self._model(2, self.config), self.example(), str(self.directory))

    @cached_property
    def _encoder(self) -> Backbone:
        def naming(names: Iterable[str]) -> dict[str, str]:  # a bound method would be deep-copied with the encoder
            return self.canonical_names(names)

        encoder = Backbone(self._prefix, self._split.backbone, self.prepare(), self._split.pick, naming)
        return encoder.eval().requires_grad_(False)

    def _head_tensors(self, name: str) -> dict[str, Tensor]:
        expert = self.experts[name]
        stored = {current: key for key, current in self._anatomy.spelled(expert).items()}
        return {key: expert[stored[key]] for key in self._anatomy.head}

    def _classes(self, name: str) -> int:
        """The number of classes of an expert's head, from headers; raises `SutureError` if there is no such head."""
        if name not in self.experts:
            found = ", ".join(self.experts) or "none"
            raise ConfigError(
                f"Task '{name}' has no model of its name, whose head would be its (found: {found}). "
                "Remedy: name a model and its task alike."
            )
        expert, classes = self.experts[name], set()
        stored = {current: key for key, current in self._anatomy.spelled(expert).items()}
        for key, expected in self._anatomy.head.items():
            if key not in stored:
                raise CheckpointError(f"'{key}' is missing from '{name}'; wanted a model with its classification head.")
            shape = expert.specs[stored[key]].shape
            if len(shape) != len(expected) or any(b not in (a, None) for a, b in zip(shape, expected, strict=True)):
                raise CheckpointError(f"'{key}' has shape {shape} in '{name}', which does not fit the base's config.")
            classes |= {a for a, b in zip(shape, expected, strict=True) if b is None}
        if len(classes) != 1:
            raise CheckpointError(f"The head of '{name}' has no one number of classes (found: {sorted(classes)}).")
        return classes.pop()

    def _rest(self, name: str, classes: int) -> Rest:
        config, axes = self._own_config(name), self._split.axes
        with torch.device("meta"):
            rest = Rest(self._model(classes, config), self._prefix, axes)
        rest.to_empty(device="cpu")
        state = rest.model.state_dict()
        for key, tensor in self._head_tensors(name).items():
            state[key].copy_(tensor)
        return rest.requires_grad_(False)

    def _own_config(self, name: str) -> Any:
        """An expert's configuration, or the pretrained model's if the expert is only weights."""
        directory = self.experts[name].directory
        own = None if directory is None else config_of(directory)
        return own if own is not None and own.model_type == self.config.model_type else self.config

    def _write_task(self, out: Path, folder: Path, name: str, classes: int) -> None:
        """Write a sharded model: a hard link to the backbone's file, and a file for the head."""
        folder.mkdir(parents=True)
        tensors = {key: tensor.contiguous() for key, tensor in self._head_tensors(name).items()}
        save_checkpoint(tensors, folder / _HEAD, metadata={"format": "pt"})
        _link(out / "model.safetensors", folder / _BACKBONE)
        files = dict.fromkeys(open_checkpoint(folder / _BACKBONE), _BACKBONE) | dict.fromkeys(tensors, _HEAD)
        total = sum((folder / file).stat().st_size for file in (_BACKBONE, _HEAD))
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
        config = deepcopy(self._own_config(name))
        config.num_labels, config.architectures = classes, [type(self._anatomy.two).__name__]
        with quiet():
            config.save_pretrained(folder)
        for path in companion_files(self.directory):
            if path.name != "config.json":
                shutil.copyfile(path, folder / path.name)


def _link(file: Path, name: Path) -> None:
    try:
        os.link(file, name)
    except OSError:  # not every file system has hard links
        shutil.copyfile(file, name)
