"""Any network: a module that a function of your own makes, named in the pool. That function's code is run.

Everything is merged, or everything but the `head`. Canonical names are the module's own.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from suture import tasks
from suture.checkpoints import Checkpoint
from suture.core.batches import Inputs, joinable
from suture.core.head import Head
from suture.core.progress import Track, untracked
from suture.errors import CheckpointError, ConfigError, DataError, SutureError, one_line, shown
from suture.families.shared.base import Encoder, Family
from suture.families.shared.code import named_object
from suture.families.shared.heads import linear_head, save_heads, stored_head
from suture.families.shared.models import Naming, check_fit, copy_into, first_names, tied_names
from suture.tasks.base import Images, Task, Texts

Transform = Callable[..., Any]
_BATCH = 64
log = logging.getLogger(__name__)


class ModuleEncoder(Encoder):
    """A module whose output is the feature (B, D), under the module's own names."""

    def __init__(self, module: nn.Module, naming: Naming, prepare: nn.Module | None = None):
        super().__init__()
        # One set of dictionaries for both: names have no prefix, and whatever is put in here is what the module runs.
        self._parameters, self._buffers, self._modules = module._parameters, module._buffers, module._modules
        object.__setattr__(self, "_module", module)
        object.__setattr__(self, "_naming", naming)
        object.__setattr__(self, "_prepare", prepare)

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        prepare: Any = self.__dict__["_prepare"]
        if prepare is not None:
            to = prepare.to  # only pixels as decoded: floating-point inputs are prepared already
            inputs = tuple(to(x.device)(x) if x.dtype == torch.uint8 else x for x in inputs)
        output = self.__dict__["_module"](*inputs, **named)
        output = output["logits"] if isinstance(output, Mapping) and "logits" in output else output
        output = getattr(output, "logits", output)
        if not isinstance(output, Tensor) or output.ndim != 2:
            found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise CheckpointError(f"The module gives {found}; wanted a tensor (inputs, width), or `logits` of it.")
        return output

    def train(self, mode: bool = True) -> "ModuleEncoder":
        super().train(mode)
        self.__dict__["_module"].training = mode
        return self

    def load(self, state: Mapping[str, Tensor]) -> "ModuleEncoder":
        """Copy in the weights of another model of this architecture; raises `CheckpointError` if they do not fit."""
        copy_into(self, state, self.__dict__["_naming"])
        return self


class Transformed:
    """Images or texts as inputs of the module, by a function of its maker; nothing of it is cached."""

    preprocessing = ""
    shape: tuple[int, ...] = ()

    def __init__(self, transform: Transform | None):
        self.transform = transform

    def decode(self, images: Images, track: Track, description: str, out: Tensor | None = None) -> Any:
        """`transform(picture)` of every image, stacked."""
        return self._stacked(lambda a, b: [(picture,) for picture in images.pictures(a, b)], images, track, description)

    def tokens(self, texts: Texts, track: Track, description: str) -> Any:
        """`transform(text)` or `transform(text, pair)` of every row, stacked."""
        return self._stacked(lambda a, b: list(zip(*texts.rows(a, b), strict=True)), texts, track, description)

    def _stacked(self, rows: Callable[[int, int], Sequence[tuple]], data: Any, track: Track, description: str) -> Any:
        if self.transform is None:
            remedy = "let the function return (module, transform), or give files of tensors"
            raise ConfigError(f"The module has no transform for images and texts. Remedy: {remedy}.")
        inputs = []
        with track(description, len(data)) as advance:
            for start in range(0, len(data), _BATCH):
                part = rows(start, start + _BATCH)
                inputs += [self._input(*row) for row in part]
                advance(len(part))
        if not all(joinable(inputs[0], other) for other in inputs):
            raise DataError("The transform gives inputs of different shapes. Remedy: pad or crop them to one.")
        return _stack(inputs)

    def _input(self, *row: Any) -> Any:
        assert self.transform is not None
        try:
            made = self.transform(*row)
        except Exception as error:  # the code is the caller's
            raise ConfigError(f"The transform failed ({type(error).__name__}: {one_line(error)}).") from error
        made = dict(made) if isinstance(made, Mapping) else made
        parts = made.values() if isinstance(made, dict) else [made]
        if not all(isinstance(part, Tensor) for part in parts):
            raise ConfigError(f"The transform gives a {type(made).__name__}; wanted a tensor or a mapping of tensors.")
        return {key: part[None] for key, part in made.items()} if isinstance(made, dict) else made[None]


class ModuleFamily(Family):
    """Weights in any file that suture reads, and the function that makes their network.

    Settings: `module`, the address of the function, `package.module:make` or `path/to/file.py:make`; `arguments`, its
    keyword arguments. It returns a module, or a pair of a module and a function that turns one image, or one or two
    texts, into the module's input. `head` names the module's last linear layer, which then stays each expert's own;
    `heads` are files of linear layers on the module's output, a mapping task → file. Without both, the module's output
    is the logits of every task.
    """

    name = "module"
    known_settings: ClassVar[frozenset[str]] = frozenset({"module", "arguments", "head", "heads"})
    needed_settings: ClassVar[frozenset[str]] = frozenset({"module"})

    def canonical_names(self, names: Iterable[str]) -> dict[str, str]:
        """Name in the module → stored name; tied tensors count under their first name."""
        stored_names: dict[str, str] = {}
        for stored in names:
            first = self._names.get(self._spelling(stored))
            if first is not None and (first == self._spelling(stored) or first not in stored_names):
                stored_names[first] = stored
        return stored_names

    def encoder(self, state: Mapping[str, Tensor] | None = None) -> ModuleEncoder:
        return deepcopy(self._encoder).load(self.weights if state is None else state)

    @property
    def reader(self) -> Any:
        """The transform that came with the module."""
        return Transformed(self._made[1])

    def head(self, task: Task, track: Track = untracked) -> Head | None:
        """The task's linear layer; None where the module gives logits."""
        return self._linear(task.name, len(task.classnames))

    def problems(self, task: Task) -> list[str]:
        """Everything that would fail later, found by running the module on two inputs of the task."""
        if task.score is not None:
            return super().problems(task)
        try:
            check_fit(first_names(self._encoder), self.canonical_names(self.weights), self.weights)
        except SutureError as error:
            return [f"{error} Remedy: check module and arguments in the pool."]
        try:
            head = self.head(task)
            if tasks.check(task, "test") or not Path(task.source).expanduser().is_dir():
                return []  # the task is refused for itself, or not here yet
            features = self._tried(self._two_inputs(task), task)
        except SutureError as error:
            return [str(error)]
        return self._width_problems(task, head, features.shape[1])

    def saved_part(self, base: Checkpoint) -> Checkpoint:
        """The tensors that are merged, under their stored names."""
        return base.select({stored: stored for stored in self.canonical_names(base).values()})

    def complete(self, out: Path) -> None:
        """Add the tasks' heads, `heads/TASK.safetensors`, if they are linear layers of their own."""
        super().complete(out)
        self.write_heads(out, self._all_heads())

    def write_heads(self, out: Path, heads: Mapping[str, Head]) -> bool:
        if self._head_name is None and not self.settings.get("heads"):
            return False
        save_heads(out, heads)
        return True

    def _linear(self, name: str, classes: int | None = None) -> Head | None:
        if self._head_name is None:
            return stored_head(self.settings["heads"], name, classes) if self.settings.get("heads") else None
        if name not in self.experts:
            found = ", ".join(self.experts) or "none"
            problem = f"Task '{name}' has no model of its name, whose head would be its (found: {found})"
            raise ConfigError(f"{problem}. Remedy: name a model and its task alike.")
        expert = self.experts[name]
        stored = {self._spelling(key): key for key in expert}
        names = [f"{self._head_name}.{part}" for part in ("weight", "bias")]
        if names[0] not in stored:
            raise CheckpointError(f"'{names[0]}' is missing from '{name}'; wanted a model with its head.")
        return linear_head({key: expert[stored[key]] for key in names if key in stored}, name, name, classes)

    def _all_heads(self) -> dict[str, Head]:
        """The heads of the pool's tasks and experts."""
        names = self.experts if self._head_name else self.settings.get("heads") or ()
        heads = {}
        for name in names:
            try:
                heads[name] = self._linear(name)
            except SutureError as error:  # the expert belongs to no task
                log.warning("The merged model gets no head of %s: %s", name, error)
        return {name: head for name, head in heads.items() if head is not None}

    @cached_property
    def _made(self) -> tuple[nn.Module, Transform | None]:
        """The module on the CPU, float32, in evaluation mode, and the transform, if any."""
        address = self.settings.get("module")
        if address is None:
            wanted = "module: package.module:function, or path/to/file.py:function, which makes the network"
            raise ConfigError(f"family=module needs {wanted}. Remedy: add it to the model pool.")
        make, arguments = named_object(address, "modelpool.module"), self.settings.get("arguments") or {}
        try:
            with torch.random.fork_rng(devices=[]):
                made = make(**arguments)
        except Exception as error:  # the code is the caller's
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise ConfigError(f"modelpool.module={shown(address)!r} failed ({reason}). Remedy: mend it.") from error
        module, transform = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
        if not isinstance(module, nn.Module) or not (transform is None or callable(transform)):
            found = f"gives a {type(made).__name__}; wanted an nn.Module, or (nn.Module, transform)"
            raise ConfigError(f"modelpool.module={shown(address)!r} {found}.")
        return module.cpu().float().eval().requires_grad_(False), transform

    @property
    def _head_name(self) -> str | None:
        return self.settings.get("head")

    def _spelling(self, stored: str) -> str:
        """The module's name of a stored tensor."""
        return stored

    def _prepare(self) -> nn.Module | None:
        """A step between the cached inputs and the module, if there is one."""
        return None

    @cached_property
    def _encoder(self) -> ModuleEncoder:
        module = self._made[0]
        if self._head_name is not None:
            parent, _, last = self._head_name.rpartition(".")
            try:
                layer = module.get_submodule(self._head_name)
            except AttributeError:
                layer = None
            if not isinstance(layer, nn.Linear):
                found = "does not exist" if layer is None else f"is a {type(layer).__name__}"
                linear = [name for name, each in module.named_modules() if isinstance(each, nn.Linear)][-4:]
                known = ", ".join(linear) or "none"
                raise ConfigError(
                    f"modelpool.head={shown(self._head_name)!r} {found} in the module; wanted its last linear layer. "
                    f"Remedy: name one of its linear layers (the last ones: {known})."
                )
            setattr(module.get_submodule(parent), last, nn.Identity())

        def naming(names: Iterable[str]) -> dict[str, str]:  # a bound method would be deep-copied with the encoder
            return self.canonical_names(names)

        return ModuleEncoder(module, naming, self._prepare()).eval().requires_grad_(False)

    @cached_property
    def _names(self) -> dict[str, str]:
        return tied_names(self._encoder)

    def _two_inputs(self, task: Task) -> Inputs:
        loaded = tasks.load(task, "test").first(2)
        if isinstance(loaded, tasks.Tensors):
            return loaded.inputs
        if isinstance(loaded, Texts):
            return self.tokens(loaded)
        return self.decode(loaded)

    def _tried(self, inputs: Inputs, task: Task) -> Tensor:
        """The module's output, with the pretrained weights, for some inputs."""
        try:
            with torch.no_grad():
                encoder = self._encoder
                output = encoder(**inputs) if isinstance(inputs, Mapping) else encoder(inputs)
        except SutureError as error:
            raise type(error)(f"Task {task.name!r}: {error}") from None
        except Exception as error:  # the code is the caller's
            parts = inputs if isinstance(inputs, Mapping) else {"inputs": inputs}
            given = ", ".join(f"{name} {tuple(part.shape)} {str(part.dtype)[6:]}" for name, part in parts.items())
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise DataError(f"Task {task.name!r}: the module fails on {given} ({reason}).") from error
        count = len(next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs)
        if len(output) != count:
            raise CheckpointError(f"Task {task.name!r}: the module gives {len(output)} rows for {count} inputs.")
        return output

    def _width_problems(self, task: Task, head: Head | None, width: int) -> list[str]:
        if head is None and width != len(task.classnames):
            problem = f"Task {task.name!r} has {len(task.classnames)} class names but the module gives {width} outputs"
            remedy = "name every output, or give `head` or `heads`, with which each task has a linear layer of its own"
            return [f"{problem}. Remedy: {remedy}."]
        if head is not None and width != head.weights.shape[1]:
            problem = (
                f"The head of task {task.name!r} takes {head.weights.shape[1]} numbers but the module gives {width}"
            )
            return [f"{problem}. Remedy: give a head that was trained on this module's output."]
        return []


def _stack(inputs: Sequence[Any]) -> Any:
    if isinstance(inputs[0], dict):
        return {key: torch.cat([each[key] for each in inputs]) for key in inputs[0]}
    return torch.cat(list(inputs))


FAMILY = ModuleFamily
