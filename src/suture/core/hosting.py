"""Modules whose weights lie in a mapped file of the host, and of which the part at work is on the device."""

import copy
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
from torch import Tensor, nn

from suture.core.fabric import Team

_ALIGNMENT = 64  # bytes


def hosted_copy(module: nn.Module, team: Team, folder: Any = None) -> nn.Module:
    """A frozen copy in evaluation mode whose parameters lie in one file that the processes of a host map.

    The file is as large as the parameters, in `folder` or the system's folder for temporary files, and goes with the
    processes. All processes make the call; the first one of each host writes the file.
    """
    ends = [0]
    parameters = list(module.parameters())
    for parameter in parameters:
        size = parameter.numel() * parameter.element_size()
        ends.append(ends[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
    memory = _mapped(ends[-1], team, folder)
    memo: dict[int, Any] = {}
    for start, parameter in zip(ends, parameters, strict=False):
        size = parameter.numel() * parameter.element_size()
        values = memory[start : start + size].view(parameter.dtype).view(parameter.shape)
        if team.first_of_host:
            values.copy_(parameter.detach())
        memo[id(parameter)] = nn.Parameter(values, requires_grad=False)
    team.wait()
    return copy.deepcopy(module, memo).eval()


@contextmanager
def resident(part: nn.Module, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Inside the block the parameters of a part of a module are copies on `device`, by their names in the part.

    Afterwards the module has its own again, as they were.
    """
    own = [(owner, name, tensor) for owner in part.modules() for name, tensor in owner._parameters.items()]
    copies = {
        id(tensor): nn.Parameter(tensor.detach().to(device, copy=True), False)
        for *_, tensor in own
        if tensor is not None
    }
    try:
        for owner, name, tensor in own:
            owner._parameters[name] = None if tensor is None else copies[id(tensor)]
        yield dict(part.named_parameters())
    finally:
        for owner, name, tensor in own:
            owner._parameters[name] = tensor


def _mapped(size: int, team: Team, folder: Any) -> Tensor:
    """So many bytes of a new file that the processes of a host share."""
    name = team.gather(f".suture-{secrets.token_hex(8)}")[0]
    path = Path(folder or gettempdir()) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if team.first_of_host:
            memory = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
            team.wait()
        else:
            team.wait()
            memory = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
        team.wait()
    finally:
        if team.first_of_host:
            path.unlink(missing_ok=True)  # what is mapped stays until it is no longer used
    return memory
