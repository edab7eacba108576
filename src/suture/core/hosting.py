"""Copies of modules whose weights lie in a file that the processes of a host map."""

import copy
import secrets
from itertools import accumulate
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
    parameters = list(module.parameters())
    starts = list(accumulate((-(-p.nbytes // _ALIGNMENT) * _ALIGNMENT for p in parameters), initial=0))
    memory = _mapped(starts.pop(), team, folder)
    memo: dict[int, Any] = {}
    for start, parameter in zip(starts, parameters, strict=True):
        values = memory[start : start + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        if team.first_of_host:
            values.copy_(values_of(parameter))
        memo[id(parameter)] = nn.Parameter(values, requires_grad=False)
    team.wait()
    return copy.deepcopy(module, memo).eval()


def _mapped(size: int, team: Team, folder: Any) -> Tensor:
    """So many bytes of a new file that the processes of a host share."""
    name = team.alike(lambda: f".suture-{secrets.token_hex(8)}")
    path = Path(folder or gettempdir()) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if not team.first_of_host:
            team.wait()  # until the file is there
        memory = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
        if team.first_of_host:
            team.wait()
        team.wait()
    finally:
        if team.first_of_host:
            path.unlink(missing_ok=True)  # what is mapped stays until it is no longer used
    return memory
