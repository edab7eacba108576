"""Modules whose weights stay where they are stored until they are needed."""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Read = Callable[[], Tensor]


def unread_copy(module: nn.Module, reads: Mapping[int, Read]) -> nn.Module:
    """A frozen copy with its own buffers; parameters of the ids in `reads` are without memory, and read when needed.

    What is read has the parameter's shape; it may have another dtype. The other parameters are the module's own.
    """
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        if (read := reads.get(id(parameter))) is None:
            memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
        else:
            empty = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
            empty.read = read  # type: ignore[attr-defined]
            memo[id(parameter)] = empty
    return copy.deepcopy(module, memo)


def is_unread(tensor: Tensor) -> bool:
    """Whether a parameter is without memory and read when needed."""
    return hasattr(tensor, "read")


def values_of(tensor: Tensor) -> Tensor:
    """The values of a tensor, read now if it is unread: then they may have another dtype."""
    return (tensor.read() if is_unread(tensor) else tensor).detach()  # type: ignore[attr-defined]


@contextmanager
def resident(
    part: nn.Module, device: torch.device, *, copied: bool = False, without: Collection[nn.Module] = ()
) -> Iterator[dict[str, Tensor]]:
    """Inside the block all tensors of a part of a module, by their names in it, are on `device`, read and in its dtype.

    They are copies if they are to be `copied`, or lie elsewhere; afterwards the module has its own again, as they were.
    Parts `without` theirs keep them.
    """
    left = {id(inner) for outer in without for inner in outer.modules()}
    owners = [owner for owner in part.modules() if id(owner) not in left]
    places: list[tuple[Any, str, Tensor]] = [
        (tensors, name, tensor)
        for owner in owners
        for tensors in (owner._parameters, owner._buffers)
        for name, tensor in tensors.items()
        if tensor is not None
    ]
    moved: dict[int, Tensor] = {}
    try:
        for tensors, name, tensor in places:
            if id(tensor) not in moved:
                values = values_of(tensor).to(device, tensor.dtype, copy=copied)
                moved[id(tensor)] = nn.Parameter(values, False) if isinstance(tensor, nn.Parameter) else values
            tensors[name] = moved[id(tensor)]
        yield dict(part.named_parameters())
    finally:
        for tensors, name, tensor in places:
            tensors[name] = tensor
