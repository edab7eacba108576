"""Entries for tensors that are already in memory: those of a module or of a mapping."""

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from suture.checkpoints.checkpoint import SUPPORTED, Entry, TensorSpec
from suture.core.names import short
from suture.errors import refusal, shown

_STATE_DICT = "give a mapping from names to dense tensors, such as a module's state_dict()"


def module_entries(module: nn.Module, label: str) -> dict[str, Entry]:
    """The tensors of a module's state dict: detached, not copied."""
    state = {n: t for n, t in module.state_dict().items() if not n.endswith("_extra_state")}
    return mapping_entries(state, label)


def mapping_entries(tensors: Mapping[Any, Any], label: str) -> dict[str, Entry]:
    """The tensors of a mapping: detached, not copied; names of the very same memory are tied."""
    return {_checked_name(name, label): _entry(name, tensor, label) for name, tensor in tensors.items()}


def _checked_name(name: Any, label: str) -> str:
    if not isinstance(name, str):
        raise refusal(
            label, f"has the key {shown(name)}, which is an object of {type(name).__name__} and no name", _STATE_DICT
        )
    return name


def _entry(name: str, tensor: Any, label: str) -> Entry:
    if not isinstance(tensor, Tensor):
        problem = f"holds an object of {type(tensor).__name__}, not a tensor, under {shown(name)!r}"
        raise refusal(label, problem, _STATE_DICT)
    kind = _unsupported(tensor)
    if kind:
        raise refusal(label, f"holds {kind} under {shown(name)!r}", _STATE_DICT)
    plain = tensor.detach()
    return Entry(TensorSpec(tuple(plain.shape), plain.dtype), lambda: plain, _memory(plain))


def _unsupported(tensor: Tensor) -> str | None:
    """The problem with a tensor; None if it is dense, in memory and of a supported dtype."""
    if tensor.is_quantized:
        return "a quantised tensor"
    if tensor.is_nested or tensor.layout != torch.strided:
        return f"a sparse or nested tensor ({short(tensor.layout)})"
    if tensor.is_meta:
        return "a meta tensor, which has no values"
    if hasattr(tensor, "__tensor_flatten__"):
        return f"a {type(tensor).__name__}, which is no plain tensor"
    if tensor.dtype not in SUPPORTED:
        return f"a tensor of the unsupported dtype {short(tensor.dtype)}"
    return None


def _memory(tensor: Tensor) -> Hashable:
    if tensor.numel() == 0:
        return None
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()
