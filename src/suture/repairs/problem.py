"""The input of a repair: a merged module, its experts and unlabelled inputs, with encodings that are cached."""

import hashlib
import os
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from suture.checkpoints import TensorSpec, allocate_checkpoint, content_hash, open_checkpoint
from suture.core.batch_sizes import BatchSize, check_batch_size, fitting, fixed_size
from suture.core.batches import Forward, Inputs, ShuffledBatches, ahead, call, device_of, size, split, take, to_device
from suture.core.fabric import Team
from suture.core.progress import Profile, Track, untracked
from suture.core.replicas import on_replicas
from suture.core.unread import values_of
from suture.errors import CheckpointError, ConfigError, DataError, IncompatibleModels
from suture.repairs.modules import SurgeryModules
from suture.repairs.network import Block, Network, position_mean
from suture.storage.resume import Resume

Experts = Callable[[str], nn.Module] | Mapping[str, nn.Module] | nn.ModuleDict
#: on_step(step, losses (task,), layer → modules) after each step. The modules are live, so copy them to keep a state.
OnStep = Callable[[int, Tensor, Mapping[str, SurgeryModules]], None]
READ_EVERY = 100  # steps of which a loss on an accelerator is read at once


@dataclass
class ForwardPasses:
    """The number of inputs that went through the merged module and through experts."""

    merged: int = 0
    experts: int = 0


@dataclass(frozen=True)
class Problem:
    """The merged `module`, the `experts`, and each task's unlabelled `inputs`, none of which is changed.

    `experts` is a mapping task → module, or a function that returns a task's module and may load all of them into one
    shared module, but not into `module`. Inputs are encoded `encode_batch` at a time (a `BatchSize`); with a folder
    `cache` the encodings are stored there in memory-mapped files. `base` is the pretrained model's state under the
    module's names, without the tensors that no repair may change because all models share them. Several `devices` share
    the batches that are encoded, each with a copy of the module. The processes of a `fabric` share the work; each has
    the module on its own device, and the first one alone writes files. On an accelerator `on_step` may be called for
    `look_every` steps at once, with the modules after the last of them, so that losses are read less often.
    `unread(task)` gives the task's expert as a module of its own whose weights are read when they are needed, for
    repairs that take a block at a time.
    """

    module: nn.Module
    experts: Experts
    inputs: Mapping[str, Inputs]
    forward: Forward = call
    cache: str | os.PathLike[str] | None = None
    encode_batch: BatchSize = 64
    resume: Resume | None = None
    on_step: OnStep | None = None
    look_every: int = 1
    track: Track = untracked
    profile: Profile = field(default_factory=Profile)
    base: Mapping[str, Tensor] | None = None
    devices: Sequence[torch.device] = ()
    fabric: Any = None
    unread: Callable[[str], nn.Module] | None = None
    passes: ForwardPasses = field(default_factory=ForwardPasses)
    _widths: dict[tuple[Block, ...], int] = field(init=False, repr=False, compare=False, default_factory=dict)
    _networks: dict[tuple[Block, ...], Network] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self):
        if not isinstance(self.inputs, Mapping) or not self.inputs:
            raise ConfigError("There are no inputs to repair with; wanted a mapping from task to inputs.")
        if not callable(self.experts) and not isinstance(self.experts, Mapping | nn.ModuleDict):
            kind = type(self.experts).__name__
            raise ConfigError(
                f"experts is a {kind}; wanted a mapping from task to module, or a function that gives it."
            )
        check_batch_size("encode_batch", self.encode_batch)
        for task, inputs in self.inputs.items():
            _check_tensors(task, inputs)
            if size(inputs) == 0:
                raise DataError(f"Task {task!r} has no inputs to repair with.")
            if isinstance(self.experts, Mapping | nn.ModuleDict) and task not in self.experts:
                found = ", ".join(self.experts) or "none"
                raise ConfigError(f"Task {task!r} has inputs but no expert (found: {found}). Remedy: name them alike.")

    @cached_property
    def team(self) -> Team:
        """The processes that share the work: this one alone without a fabric."""
        return Team(self.fabric)

    @property
    def tasks(self) -> list[str]:
        """The tasks, in the order of the inputs."""
        return list(self.inputs)

    @property
    def device(self) -> torch.device:
        """The device of the merged module and of its repair."""
        return self.team.device if self.team.sharded and self.team.device else device_of(self.module)

    @cached_property
    def running(self) -> tuple[nn.Module, Forward]:
        """The merged module where it can run, and the function that runs it; see `Team.placed`."""
        return self._placed(self.module)

    def network(self, blocks: tuple[Block, ...] = ()) -> Network:
        """The merged module as a network with these blocks."""
        if blocks not in self._networks:
            self._networks[blocks] = Network(*self.running, blocks)
        return self._networks[blocks]

    def _placed(self, module: nn.Module) -> tuple[nn.Module, Forward]:
        if not self.team.sharded:
            return module, self.forward
        placed = self.team.placed(module)
        return placed.module, lambda part, inputs: placed.run(partial(self.forward, part, inputs))

    @property
    def read_every(self) -> int:
        """The number of steps after which their losses are read from the device."""
        if self.device.type == "cpu":
            return 1
        return READ_EVERY if self.on_step is None else self.look_every

    def expert(self, task: str) -> nn.Module:
        """The task's fine-tuned module."""
        module = self.experts[task] if isinstance(self.experts, Mapping | nn.ModuleDict) else self.experts(task)
        if not isinstance(module, nn.Module):
            raise ConfigError(f"The expert of task {task!r} is a {type(module).__name__}; wanted a module.")
        return module

    def merged_rows(self, task: str, inputs: Inputs, blocks: tuple[Block, ...] = ()) -> Float[Tensor, "input width"]:
        """Encodings by the merged module; see `rows`."""
        return self.rows("merged", self.module, task, inputs, blocks)

    def expert_rows(self, task: str, inputs: Inputs, blocks: tuple[Block, ...] = ()) -> Float[Tensor, "input width"]:
        """Encodings by the task's expert; see `rows`."""
        return self.rows("experts", self.expert(task), task, inputs, blocks)

    def rows(
        self,
        kind: Literal["merged", "experts"],
        module: nn.Module,
        task: str,
        inputs: Inputs,
        blocks: tuple[Block, ...] = (),
    ) -> Float[Tensor, "input width"]:
        """Encodings, one row per input: the mean over positions of every block's output, then the feature.

        On the CPU; from the cache if these weights have encoded these inputs before.
        """
        path = None
        if self.cache is not None:
            key = self.team.alike(lambda: _key(module, self.forward, inputs, blocks))
            path = Path(self.cache) / f"{key}.safetensors"
        cached = None if path is None else _cached(path, size(inputs))
        everywhere = path is not None and None not in self.team.gather(cached if cached is None else ())
        if cached is not None and everywhere:
            self._check_width(kind, task, cached, inputs, blocks)
            return cached
        description = f"Encoding {task} ({'merged' if kind == 'merged' else 'expert'})"
        check = partial(self._check_width, kind, task, inputs=inputs, blocks=blocks)
        network = self.network(blocks) if kind == "merged" else Network(*self._placed(module), blocks)
        encoded = self._encoded(network, inputs, description, check)
        setattr(self.passes, kind, getattr(self.passes, kind) + size(inputs))
        if path is None or self.team.rank > 0:
            return torch.cat(list(encoded))
        return _stored(path, encoded, size(inputs))

    def _encoded(
        self, network: Network, inputs: Inputs, description: str, check: Callable[[Tensor], None]
    ) -> Iterator[Tensor]:
        number, means = fixed_size(self.encode_batch), layer_means
        if self.team.world == 1:
            given = (network, inputs, network.device)
            number, means = fitting(self.encode_batch, "encoded", layer_means, *given)
        with self.track(description, size(inputs)) as advance:
            for rows in self._rows_of_batches(network, split(inputs, number), means):
                check(rows)
                yield rows
                advance(len(rows))

    def _rows_of_batches(self, network: Network, batches: Iterator[Any], means: Forward) -> Iterator[Tensor]:
        """The rows of each batch; several processes, or else several `devices`, share the batches."""

        def rows(copied: nn.Module, batch: Any) -> Tensor:
            assert isinstance(copied, Network)
            return means(copied, to_device(batch, copied.device)).cpu()

        if self.team.world > 1:
            return self.team.each(partial(rows, network), batches, together=self.team.sharded)
        if len(self.devices) > 1:
            return on_replicas(network, self.devices, rows, batches)
        return (rows(network, batch) for batch in ahead(batches, network.device))

    def _check_width(self, kind: str, task: str, rows: Tensor, inputs: Inputs, blocks: tuple[Block, ...]) -> None:
        """Raise `IncompatibleModels` for an expert whose outputs have another width than the merged module's."""
        if kind == "merged":
            self._widths[blocks] = rows.shape[1]
        elif blocks not in self._widths:
            network = self.network(blocks)
            first = to_device(take(inputs, slice(0, 1)), network.device)
            self._widths[blocks] = layer_means(network, first).shape[1]
        if rows.shape[1] != self._widths[blocks]:
            what = "blocks and features" if blocks else "features"
            raise IncompatibleModels(
                f"The expert of task {task!r} gives {what} of width {rows.shape[1]}, the merged module of width "
                f"{self._widths[blocks]}. Remedy: give experts of the merged module's architecture."
            )


class Order:
    """The batches of every step and task, and the inputs that are used at all.

    `used`: task → sorted positions of the used inputs, all of them if `whole`. Batches are positions in `used`.
    """

    def __init__(self, inputs: Mapping[str, Inputs], steps: int, batch_size: int, seed: int, *, whole: bool = False):
        streams = {task: ShuffledBatches(rows, batch_size, seed=seed, name=task) for task, rows in inputs.items()}
        self._streams, self._inputs = list(streams.values()), inputs
        self.used: dict[str, Int[Tensor, " input"]] = {}
        for task, stream in streams.items():
            everything = torch.arange(size(inputs[task]))
            few = not whole and steps * batch_size < len(everything)
            self.used[task] = torch.cat([stream.indices(s) for s in range(steps)]).unique() if few else everything

    def inputs(self, task: str) -> Inputs:
        """The inputs that are used."""
        everything = len(self.used[task]) == size(self._inputs[task])
        return self._inputs[task] if everything else take(self._inputs[task], self.used[task])

    def __call__(self, step: int) -> list[Int[Tensor, " batch"]]:
        pairs = zip(self.used.values(), self._streams, strict=True)
        return [torch.searchsorted(used, stream.indices(step)) for used, stream in pairs]


@torch.no_grad()
def layer_means(network: Network, inputs: Any) -> Float[Tensor, "input width"]:
    """The means over positions of every block's output, and the feature, concatenated."""
    means: list[Tensor] = []
    network(inputs, lambda i, rows: means.append(position_mean(rows, inputs)))
    return torch.cat(means, dim=1)


def _check_tensors(task: str, inputs: Any) -> None:
    """Raise `DataError` for inputs that are not tensors with a first axis for the inputs."""
    if isinstance(inputs, Mapping | tuple | list) and len(inputs):
        for part in inputs.values() if isinstance(inputs, Mapping) else inputs:
            _check_tensors(task, part)
    elif not isinstance(inputs, Tensor) or inputs.ndim == 0:
        kind = "a tensor without axes" if isinstance(inputs, Tensor) else f"a {type(inputs).__name__}"
        raise DataError(
            f"The inputs of task {task!r} are or hold {kind}; wanted a tensor (N, …), or a mapping of such tensors. "
            "Remedy: torch.tensor(…) of a list of numbers."
        )


def _key(module: nn.Module, forward: Forward, inputs: Inputs, blocks: tuple[Block, ...]) -> str:
    """A hash of weights, architecture, `forward`, inputs and blocks."""
    tensors = inputs if isinstance(inputs, Mapping) else {"": inputs}
    state = {name: values_of(tensor) for name, tensor in module.state_dict(keep_vars=True).items()}
    facts = [content_hash(state), repr(module), _described(forward), content_hash(tensors), repr(blocks)]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()


def _described(function: Any) -> str:
    """The identity of a function: its code, defaults and closure, or for other objects their repr."""
    if isinstance(function, partial):
        return repr((_described(function.func), function.args, function.keywords))
    if not isinstance(function, types.FunctionType):
        return repr(function)
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    closed = [_described(content) if callable(content) else repr(content) for content in cells]
    return repr((function.__module__, function.__qualname__, _code(function.__code__), function.__defaults__, closed))


def _code(code: types.CodeType) -> tuple[Any, ...]:
    constants = [_code(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    return (code.co_code.hex(), code.co_names, constants)


def _cached(path: Path, count: int) -> Tensor | None:
    try:
        rows = open_checkpoint(path)["rows"] if path.is_file() else None
    except (CheckpointError, KeyError):  # a damaged file is replaced
        return None
    return rows if rows is not None and len(rows) == count else None


def _stored(path: Path, encoded: Iterator[Tensor], count: int) -> Tensor:
    first = next(encoded)
    spec = TensorSpec((count, first.shape[1]), first.dtype)
    with allocate_checkpoint({"rows": spec}, path) as file:
        file["rows"][: len(first)] = first
        start = len(first)
        for rows in encoded:
            file["rows"][start : start + len(rows)] = rows
            start += len(rows)
    return open_checkpoint(path)["rows"]
