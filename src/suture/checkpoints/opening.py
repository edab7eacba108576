"""Open a checkpoint of any kind: a file, a model directory, a hub id, a module or a mapping."""

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from suture.checkpoints.checkpoint import Checkpoint
from suture.checkpoints.live_tensors import mapping_entries, module_entries
from suture.checkpoints.refusals import shown
from suture.checkpoints.safetensors_files import read_safetensors
from suture.errors import CheckpointError

Source = str | os.PathLike[str] | nn.Module | Mapping[str, Tensor]


def open_checkpoint(source: Source, *, label: str | None = None, revision: str | None = None) -> Checkpoint:
    """Open a checkpoint from its headers alone; its tensors are read when they are asked for.

    `source` is a safetensors file, a PyTorch file, an index of shards, a model directory, a hub id ("org/name", with an
    optional `revision`), a "zoo:…" name, a module, a mapping name → tensor, or an open checkpoint, which is returned as
    it is. `label` is what messages call it. Nothing that a pickle asks to run is run. Raises `CheckpointError`.

    >>> import torch
    >>> open_checkpoint({"w": torch.zeros(2, 3)}).specs["w"].shape
    (2, 3)
    """
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, nn.Module):
        label = label or "<module>"
        return Checkpoint(module_entries(source, label), label)
    if isinstance(source, Mapping):
        label = label or "<mapping>"
        return Checkpoint(mapping_entries(source, label), label)
    try:
        return open_file(Path(source), label or str(source))
    except CheckpointError as error:
        raise CheckpointError(f"'{shown(label)}': {error}" if label else str(error)) from error


def open_file(path: Path, label: str) -> Checkpoint:
    entries, metadata = read_safetensors(path)
    return Checkpoint(entries, label, files=(path,), directory=None, metadata=metadata)
