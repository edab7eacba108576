"""Opening a checkpoint of any kind: a file, a model directory, a hub id, a module or a mapping."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from suture.checkpoints.checkpoint import Checkpoint, Entry
from suture.checkpoints.decoding import decoded
from suture.checkpoints.directories import INDEX_SUFFIX, check_links, read_sharded, weight_file
from suture.checkpoints.formats import read_entries
from suture.checkpoints.json_files import is_text
from suture.checkpoints.live_tensors import mapping_entries, module_entries
from suture.checkpoints.quantised import quantisation
from suture.checkpoints.state_dicts import without_prefix
from suture.errors import CheckpointError, refusal, shown
from suture.storage.addresses import ZOO_ADDRESS, zoo_path
from suture.storage.hub import download, is_hub_id
from suture.storage.remote import RemotePath, is_remote

log = logging.getLogger(__name__)
Source = str | os.PathLike[str] | nn.Module | Mapping[str, Tensor]


def open_checkpoint(
    source: Source, *, label: str | None = None, revision: str | None = None, key: str | None = None
) -> Checkpoint:
    """Open a checkpoint from its headers alone; its tensors are read when they are asked for.

    `source` is a safetensors file, a PyTorch file, an index of shards, a model directory, a hub id ("org/name", with an
    optional `revision`), a "zoo:…" name, a module, a mapping name → tensor, or an open checkpoint, which is returned as
    it is; or the address of safetensors files, such as s3://… or hf://…, of which only the tensors that are asked for
    are read. `label` is what messages call it. `key` chooses one of several models in a PyTorch file (`params_ema`,
    `teacher`). Nothing that a pickle asks to run is run. A prefix that DataParallel or torch.compile put before every
    name of a file is left out. Low-precision codes of files are decoded with their scales when they are read
    (`decoding` lists the formats).

    Raises `CheckpointError`: missing, truncated, corrupt, no weights, or a pickle that asks to run code.

    >>> import torch
    >>> open_checkpoint({"w": torch.zeros(2, 3)}).specs["w"].shape
    (2, 3)
    """
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, nn.Module):
        return _in_memory(module_entries(source, label or "<module>"), label or "<module>")
    if isinstance(source, Mapping):
        return _in_memory(mapping_entries(source, label or "<mapping>"), label or "<mapping>")
    if not isinstance(source, str | os.PathLike):
        problem = f"is an object of {type(source).__name__}, not a model"
        raise refusal(label or shown(source), problem, "give a path, a hub id, a module or a mapping")
    try:
        check_text(source, label)
        opened = _open_path(_locate(source, revision), label or str(source), key)
    except CheckpointError as error:
        raise CheckpointError(f"'{shown(label)}': {error}" if label else str(error)) from error
    if label:  # a model that somebody named, not a part that is looked at on the way
        log.info("%s: %d tensors in %s", label, len(opened), source)
    return opened


def check_text(source: str | os.PathLike[str], label: str | None) -> None:
    """Refuse names that cannot be written into a report or a configuration: bytes that are not UTF-8."""
    for text in (label or "", os.fspath(source)):
        if not is_text(text):
            raise refusal(text, "is a name with bytes that are not UTF-8", "rename it")


def _in_memory(entries: Mapping[str, Entry], label: str) -> Checkpoint:
    return Checkpoint(entries, label, quantised=quantisation({name: entry.spec for name, entry in entries.items()}))


def _locate(source: str | os.PathLike[str], revision: str | None) -> Any:
    """The file or directory that a source names; a hub's is fetched, one at an address stays there."""
    if isinstance(source, RemotePath) or is_remote(source):
        return _remote(RemotePath(str(source)), revision)
    if isinstance(source, str) and source.startswith(ZOO_ADDRESS):
        return zoo_path(source)
    path = Path(source)
    if not _exists(path):
        if path.is_symlink():
            remedy = "copy or download that file"
            raise refusal(source, f"is a link to '{os.readlink(path)}', where no file is", remedy)
        if isinstance(source, str) and is_hub_id(source):
            return download(source, revision)
        raise refusal(source, "does not exist", "check the path, or give a hub id of the form org/name")
    if revision is not None:
        raise refusal(source, f"is on disk, so it has no revision '{shown(revision)}'", "leave the revision out")
    return path


def _remote(path: RemotePath, revision: str | None) -> RemotePath:
    if revision is not None:
        raise refusal(path, f"is an address, so it has no revision '{shown(revision)}'", "leave the revision out")
    try:
        if path.exists():
            return path
    except OSError as error:
        raise refusal(path, f"cannot be read: {_reason(error)}", "check the network and your rights") from error
    raise refusal(path, "does not exist", "check the address and your rights")


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:  # no permission, a name too long, links in a circle, a zero byte
        raise refusal(path, f"cannot be opened: {_reason(error)}", "check the path and its permissions") from error
    return True


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _open_path(path: Any, label: str, key: str | None = None) -> Checkpoint:
    try:
        directory = path if path.is_dir() else _model_directory(path.parent)
        if directory is not None:
            check_links(directory)
        file = weight_file(path) if path.is_dir() else path
    except OSError as error:
        raise refusal(path, f"cannot be read: {_reason(error)}", "check the path and its permissions") from error
    if file.name.endswith(INDEX_SUFFIX):
        (entries, files), metadata = read_sharded(file), None
    else:
        (entries, metadata), files = read_entries(file, key), (file,)
    entries, prefix = without_prefix(entries)
    entries, formats = decoded(entries, directory, label)
    kind = quantisation({name: entry.spec for name, entry in entries.items()})
    about = {"files": files, "directory": directory, "metadata": metadata}
    return Checkpoint(entries, label, **about, quantised=kind, prefix=prefix, decoded=formats)


def _model_directory(folder: Any) -> Any:
    return folder if (folder / "config.json").is_file() else None
