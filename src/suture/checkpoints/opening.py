"""Open a checkpoint of any kind: a file, a model directory, a hub id, a module or a mapping."""

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from suture.checkpoints.checkpoint import Checkpoint
from suture.checkpoints.directories import INDEX_SUFFIX, read_sharded, weight_file
from suture.checkpoints.formats import read_entries
from suture.checkpoints.live_tensors import mapping_entries, module_entries
from suture.errors import CheckpointError, refusal, shown
from suture.storage.addresses import ZOO_ADDRESS, zoo_path
from suture.storage.hub import download, is_hub_id

Source = str | os.PathLike[str] | nn.Module | Mapping[str, Tensor]


def open_checkpoint(source: Source, *, label: str | None = None, revision: str | None = None) -> Checkpoint:
    """Open a checkpoint from its headers alone; its tensors are read when they are asked for.

    `source` is a safetensors file, a PyTorch file, an index of shards, a model directory, a hub id
    ("org/name", with an optional `revision`), a "zoo:…" name, a module, a mapping name → tensor, or an open
    checkpoint, which is returned as it is. `label` is what messages call it. Nothing that a pickle asks to
    run is run.

    Raises `CheckpointError`: missing, truncated, corrupt, no weights, or a pickle that asks to run code.

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
        return _open_path(_locate(source, revision), label or str(source))
    except CheckpointError as error:
        raise CheckpointError(f"'{shown(label)}': {error}" if label else str(error)) from error


def _locate(source: str | os.PathLike[str], revision: str | None) -> Path:
    """The file or directory that a source names, fetched if it has to be."""
    if isinstance(source, str) and source.startswith(ZOO_ADDRESS):
        return zoo_path(source)
    path = Path(source)
    if not path.exists():
        if isinstance(source, str) and is_hub_id(source):
            return download(source, revision)
        raise refusal(source, "does not exist", "check the path, or give a hub id of the form org/name")
    if revision is not None:
        raise refusal(source, f"is on disk, so it has no revision '{shown(revision)}'", "leave the revision out")
    return path


def _open_path(path: Path, label: str) -> Checkpoint:
    directory = path if path.is_dir() else _model_directory(path.parent)
    file = weight_file(path) if path.is_dir() else path
    if file.name.endswith(INDEX_SUFFIX):
        entries, files = read_sharded(file)
        return Checkpoint(entries, label, files=files, directory=directory)
    entries, metadata = read_entries(file)
    return Checkpoint(entries, label, files=(file,), directory=directory, metadata=metadata)


def _model_directory(folder: Path) -> Path | None:
    return folder if (folder / "config.json").is_file() else None
