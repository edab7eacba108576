"""Batches of inputs: a tensor, or a mapping of tensors for keyword arguments; the first axis counts the inputs."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

from suture.core.random import generator_for
from suture.errors import ConfigError, DataError

M = TypeVar("M", bound=nn.Module)
Inputs = Tensor | Mapping[str, Tensor]
Forward = Callable[[Any, Any], Tensor]  # (module, inputs) → (batch, …)
_AHEAD = 2  # batches that are read and sent while a GPU computes
_END = object()


class ShuffledBatches:
    """Endless batches of one task's inputs, in an order that depends only on seed, name and step.

    Every input is used once before any is used again; a batch that reaches the end of one order continues in the next.
    The batch of any step can be computed directly, so an interrupted loop resumes with the batch it would have had.

    >>> batches = ShuffledBatches(torch.arange(5), 3, seed=1, name="digits")
    >>> sorted(torch.cat([batches[0], batches[1]])[:5].tolist())
    [0, 1, 2, 3, 4]
    """

    def __init__(self, inputs: Inputs, batch_size: int = 16, *, seed: int = 0, name: str = ""):
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}: wanted 1 or more.")
        if size(inputs) == 0:
            raise DataError(f"Task {name!r} has no inputs.")
        self.inputs, self.batch_size = inputs, batch_size
        self.seed, self.name = seed, name
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def __getitem__(self, step: int) -> Inputs:
        return take(self.inputs, self.indices(step))

    def __iter__(self) -> Iterator[Inputs]:
        step = 0
        while True:
            yield self[step]
            step += 1

    def indices(self, step: int) -> Int[Tensor, " batch"]:
        """Positions of the inputs in the batch of a step; steps count from 0."""
        start, stop = step * self.batch_size, (step + 1) * self.batch_size
        parts = []
        while start < stop:
            epoch, offset = divmod(start, size(self.inputs))
            part = self._order(epoch)[offset : offset + stop - start]
            parts.append(part)
            start += len(part)
        return torch.cat(parts)

    def _shuffled(self, epoch: int) -> Tensor:
        generator = generator_for(self.seed, f"{self.name}/order/{epoch}")
        return torch.randperm(size(self.inputs), generator=generator)


def size(batch: Any) -> int:
    """The number of inputs in a batch."""
    if isinstance(batch, Mapping):
        return size(next(iter(batch.values())))
    return size(batch[0]) if isinstance(batch, tuple | list) else len(batch)


def nbytes(batch: Any) -> int:
    """The size of the tensors in a batch."""
    if isinstance(batch, Mapping):
        return sum(map(nbytes, batch.values()))
    return sum(map(nbytes, batch)) if isinstance(batch, tuple | list) else batch.nbytes


def take(batch: Any, index: Tensor | slice) -> Any:
    """The inputs at some positions."""
    if isinstance(batch, Mapping):
        return {key: take(value, index) for key, value in batch.items()}
    return tuple(take(part, index) for part in batch) if isinstance(batch, tuple | list) else batch[index]


def split(inputs: Inputs, batch_size: int) -> Iterator[Any]:
    """The inputs in order, in batches."""
    for start in range(0, size(inputs), batch_size):
        yield take(inputs, slice(start, start + batch_size))


class Reached(Exception):
    """Raised by a hook: the forward pass has reached the layer that was wanted, and the rest of it is not needed."""


def joinable(one: Any, other: Any) -> bool:
    """Whether two batches can be concatenated; texts padded to different lengths cannot."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape[1:] == other.shape[1:]
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(joinable(one[key], other[key]) for key in one)
    if not isinstance(one, tuple | list) or not isinstance(other, tuple | list) or len(one) != len(other):
        return False
    return all(map(joinable, one, other))


def concatenate(batches: Sequence[Any]) -> Any:
    """Several `joinable` batches as one."""
    first = batches[0]
    if isinstance(first, Tensor):
        return torch.cat(list(batches))
    if isinstance(first, Mapping):
        return {key: concatenate([batch[key] for batch in batches]) for key in first}
    return tuple(concatenate(parts) for parts in zip(*batches, strict=True))


def device_of(module: nn.Module) -> torch.device:
    """The device of the module's weights, where its inputs must be too; the CPU for one without any, or none read."""
    return next((t.device for t in module.state_dict().values() if not t.is_meta), torch.device("cpu"))


def to_device(inputs: Any, device: torch.device) -> Any:
    """The same batch with its tensors on a device; anything else is passed through."""
    if isinstance(inputs, Mapping):
        return {key: to_device(value, device) for key, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return tuple(to_device(value, device) for value in inputs)
    return inputs.to(device) if isinstance(inputs, Tensor) else inputs


class Upcoming:
    """Batches of one step after another on a device. On a GPU the next ones are sent while it computes.

    They are copied from pinned memory, so that neither the device nor this process waits for the copy.
    """

    def __init__(self, batches: Iterator[Any], device: torch.device):
        self.batches, self.device = batches, device
        self._next: list[Any] = []

    def prepare(self) -> None:
        """Send the batches of the next step, if there is one; on a CPU they wait until they are asked for."""
        if self.device.type == "cuda" and not self._next:
            self._next = [sent(batch, self.device) for batch in islice(self.batches, 1)]

    def __next__(self) -> Any:
        return self._next.pop() if self._next else to_device(next(self.batches), self.device)


def ahead(batches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """The batches on a device, in order; for a GPU a thread reads and sends the next ones while it computes.

    >>> list(ahead([torch.tensor(1), torch.tensor(2)], torch.device("cpu")))
    [tensor(1), tensor(2)]
    """
    if device.type != "cuda":
        yield from (to_device(batch, device) for batch in batches)
        return
    source = iter(batches)
    send = lambda: _END if (batch := next(source, _END)) is _END else sent(batch, device)
    with ThreadPoolExecutor(1) as reader:
        sending = deque(reader.submit(send) for _ in range(_AHEAD))
        while (batch := sending.popleft().result()) is not _END:
            sending.append(reader.submit(send))
            yield batch


def channels_last(inputs: Any) -> Any:
    """The same batch, with the channels of pictures (input, channel, row, column) beside one another in memory.

    Convolutions take the order of their inputs, and so do the layers after them.
    """
    if isinstance(inputs, Mapping):
        return {key: channels_last(value) for key, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return tuple(channels_last(value) for value in inputs)
    if not isinstance(inputs, Tensor) or inputs.ndim != 4:
        return inputs
    return inputs.contiguous(memory_format=torch.channels_last)


def order_kernels(module: M) -> M:
    """The module, with the channels of its convolutions' kernels beside one another in memory, as `channels_last` has.

    They stay so whatever is copied into them, so that no call has to turn them around.
    """
    kernels = [part.weight for part in module.modules() if isinstance(part, nn.Conv2d | nn.ConvTranspose2d)]
    for kernel in kernels:
        kernel.data = kernel.data.contiguous(memory_format=torch.channels_last)
    return module


def sent(inputs: Any, device: torch.device) -> Any:
    """As `to_device`, from pinned memory and without waiting for the copy to a GPU."""
    if isinstance(inputs, Mapping):
        return {key: sent(value, device) for key, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return tuple(sent(value, device) for value in inputs)
    if not isinstance(inputs, Tensor) or inputs.device.type != "cpu" or device.type == "cpu":
        return to_device(inputs, device)
    return inputs.pin_memory().to(device, non_blocking=True)


def call(module: Any, inputs: Any) -> Tensor:
    """The module's output for a batch, (batch, …), or its `logits` where the output is an object with that attribute.

    A mapping is passed as keyword arguments. Raises `ConfigError` if the output is neither, or the batch is a tuple.
    """
    if isinstance(inputs, tuple | list):
        raise ConfigError(
            "A batch is a tuple. Remedy: give forward=lambda module, batch: module(batch[0]), or inputs alone."
        )
    output = module(**inputs) if isinstance(inputs, Mapping) else module(inputs)
    tensor = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(tensor, Tensor):
        kind = type(output).__name__
        raise ConfigError(f"The module gives a {kind}, not a tensor. Remedy: give forward=lambda module, inputs: …")
    return tensor


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Inside the block dropout is off and statistics are fixed; afterwards each submodule is back in its own mode."""
    modes = [(m, m.training) for m in model.modules()] if isinstance(model, nn.Module) else []
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training
