"""Encoders with the weights of another model, which are read when they are needed."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from suture.checkpoints import Checkpoint
from suture.core.unread import unread_copy
from suture.errors import ConfigError
from suture.families.shared.base import Encoder


def unread_encoder(encoder: Encoder, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of an encoder with another model's weights, unread; only its buffers are read at once.

    The family's own `load` says which tensor goes where. Raises `CheckpointError` if the weights do not fit, and
    `ConfigError` for a family that computes weights from what it loads.
    """
    names = _names(encoder, state)
    reads = {number: partial(state.__getitem__, name) for number, name in names.items()}
    copied = unread_copy(encoder, reads)
    with torch.no_grad():
        for own, buffer in zip(encoder.buffers(), copied.buffers(), strict=True):
            if id(own) in names:
                buffer.copy_(state[names[id(own)]])
    return copied


def _names(encoder: Encoder, state: Mapping[str, Tensor]) -> dict[int, str]:
    """The id of every tensor that `load` writes → the name of what it writes there; nothing is read or written."""
    written, placeholders = _Written(), _Placeholders(state)
    with written:
        encoder.load(placeholders)
    names, known = {}, {id(tensor) for tensor in (*encoder.parameters(), *encoder.buffers())}
    for number, source in written.sources.items():
        if id(source) not in placeholders.names or number not in known:
            kind = type(encoder).__name__
            raise ConfigError(f"fabric.strategy=fsdp: a {kind} computes its weights, so parts of them cannot be read.")
        names[number] = placeholders.names[id(source)]
    return names


class _Written(TorchFunctionMode):
    """Inside the block copies into tensors are not made, but noted: id of the target → its source."""

    def __init__(self):
        super().__init__()
        self.sources: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.Tensor.copy_:
            return func(*args, **(kwargs or {}))
        self.sources[id(args[0])] = args[1]
        return args[0]


class _Placeholders(Mapping[str, Tensor]):
    """A state's names with tensors of its shapes and dtypes that have no memory."""

    def __init__(self, state: Mapping[str, Tensor]):
        self.label = getattr(state, "label", "the model")
        specs: Mapping[str, Any] = state.specs if isinstance(state, Checkpoint) else state
        self._tensors = {n: torch.empty(each.shape, dtype=each.dtype, device="meta") for n, each in specs.items()}
        self.names = {id(tensor): name for name, tensor in self._tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
