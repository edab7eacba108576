"""Inputs in the forms that people have them: tensors, arrays, loaders, files."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from suture.checkpoints import open_checkpoint
from suture.core.batches import Inputs, ShuffledBatches, concatenate, joinable
from suture.errors import DataError

#: A tensor or an array (N, …), a mapping of such, a file of them, a loader of batches, or anything with `inputs`.
Given = Any
_LABELS = ("labels", "label", "targets", "y")  # keys of labels in a mapping or a file
_WANTED = "wanted a tensor, a mapping of tensors, a loader of batches, or a .pt, .npy or .safetensors file"


def inputs_of(given: Given, task: str) -> Inputs:
    """The inputs of a task: (N, …), or a mapping of such tensors. Labels beside them are left out.

    A loader gives batches of inputs, or pairs (inputs, labels); all of its batches are read. Raises `DataError` for
    anything else.

    >>> inputs_of([(torch.zeros(2, 3), torch.zeros(2)), (torch.ones(1, 3), torch.zeros(1))], "digits").shape
    torch.Size([3, 3])
    """
    return _separated(given, task)[0]


def labelled(given: Given, task: str) -> tuple[Inputs, Tensor]:
    """The inputs of a task and their labels (N,): of a pair, a mapping or file with `labels`, or a loader of pairs."""
    if isinstance(given, tuple) and len(given) == 2:
        inputs, labels = _separated(given[0], task)[0], _tensor(given[1])
    else:
        inputs, labels = _separated(given, task)
    if labels is None:
        raise DataError(f"Task {task!r} has no labels. Remedy: give (inputs, labels), or a loader of such pairs.")
    return inputs, labels.long()


def batches_of(given: Any, task: str, batch_size: int, seed: int) -> Any:
    """Batches of a task's inputs: those of a list or a loader as they are, shuffled ones of inputs given whole."""
    whole = isinstance(given, Tensor | Mapping | np.ndarray | str | os.PathLike) or hasattr(given, "inputs")
    if not whole or isinstance(given, ShuffledBatches):
        return given
    return ShuffledBatches(inputs_of(given, task), batch_size, seed=seed, name=task)


def _separated(given: Given, task: str) -> tuple[Inputs, Tensor | None]:
    """Inputs, and labels if there are any."""
    if hasattr(given, "inputs") and not isinstance(given, Mapping):
        return given.inputs, getattr(given, "labels", None)
    if isinstance(given, str | os.PathLike):
        given = _read(Path(given), task)
    if isinstance(given, Tensor | np.ndarray):
        return _tensor(given), None
    if isinstance(given, Mapping):
        return _without_labels({key: _tensor(value) for key, value in given.items()})
    if isinstance(given, Iterable):
        return _joined(given, task)
    raise DataError(f"The inputs of task {task!r} are a {type(given).__name__}; {_WANTED}.")


def _tensor(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def _without_labels(tensors: dict[str, Any]) -> tuple[Inputs, Tensor | None]:
    labels = next((tensors.pop(key) for key in _LABELS if key in tensors), None)
    single = len(tensors) == 1 and "inputs" in tensors
    return (tensors["inputs"] if single else tensors), labels


def _read(path: Path, task: str) -> Any:
    if not path.is_file():
        raise DataError(f"Task {task!r}: there is no file {str(path)!r}. Remedy: give the path of a file of tensors.")
    if path.suffix == ".npy":
        try:
            return np.load(path, allow_pickle=False)
        except ValueError as error:
            raise DataError(f"Task {task!r}: {str(path)!r} is not an array: {error}.") from None
    return dict(open_checkpoint(path))


def _joined(batches: Iterable[Any], task: str) -> tuple[Inputs, Tensor | None]:
    """The batches of a loader as one."""
    pairs = [_of_batch(batch, task) for batch in batches]
    if not pairs:
        raise DataError(f"The inputs of task {task!r} have no batches.")
    inputs = [pair[0] for pair in pairs]
    if not all(joinable(inputs[0], other) for other in inputs):
        raise DataError(f"Task {task!r}: batches differ in shape. Remedy: pad all inputs to one length.")
    labels = [pair[1] for pair in pairs if pair[1] is not None]
    return concatenate(inputs), torch.cat(labels) if len(labels) == len(pairs) else None


def _of_batch(batch: Any, task: str) -> tuple[Any, Tensor | None]:
    if isinstance(batch, tuple | list):
        inputs, *rest = batch
        return _separated(inputs, task)[0], _tensor(rest[0]) if rest else None
    if isinstance(batch, Tensor | np.ndarray | Mapping):
        return _separated(batch, task)
    raise DataError(f"A batch of task {task!r} is a {type(batch).__name__}; {_WANTED}.")
