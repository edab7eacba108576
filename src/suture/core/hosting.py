"""Copies of modules whose weights lie in a file that the processes of a host map."""

import copy
import secrets
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
from torch import Tensor, nn

from suture.core.fabric import Team
from suture.core.unread import values_of

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
            values.copy_(values_of(parameter))
        memo[id(parameter)] = nn.Parameter(values, requires_grad=False)
    team.wait()
    return copy.deepcopy(module, memo).eval()


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
