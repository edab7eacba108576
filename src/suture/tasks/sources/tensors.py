"""Files of tensors, as the model takes them: train.pt and test.pt (or .safetensors, .npy) with inputs and labels."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from suture.core.batches import size
from suture.errors import DataError, data_refusal, shown
from suture.tasks.base import Source, Split, Task, Tensors, files_identity
from suture.tasks.given import labelled

SUFFIXES = (".safetensors", ".pt", ".pth", ".npy")
_SPLITS = ("train", "test", "val", "validation", "valid")
_LABELS = "_labels.npy"


def found(folder: Path) -> bool:
    """Whether a folder holds tensors of a split."""
    return any((folder / f"{split}{suffix}").is_file() for split in _SPLITS for suffix in SUFFIXES)


def _load(folder: Path, split: Split, task: Task) -> Tensors:
    files = _files(folder, split, task)
    inputs, labels = labelled(files[0] if len(files) == 1 else (files[0], _labels_alone(files[1], task)), task.name)
    labels = _checked(inputs, labels, files[0], task)
    return Tensors(_single(inputs), labels, None, files_identity(files))


def _problems(folder: Path, split: Split, task: Task) -> list[str]:
    try:
        _load(folder, split, task)
    except DataError as error:
        return [str(error).removeprefix(f"Task {task.name!r}: ")]
    return []


def _count(folder: Path, split: Split, task: Task) -> int | None:
    return len(_load(folder, split, task))


def _files(folder: Path, split: Split, task: Task) -> list[Path]:
    """The file of inputs and labels, or the two arrays."""
    name = task.splits.get(split, split)
    for suffix in SUFFIXES:
        file, labels = folder / f"{name}{suffix}", folder / f"{name}{_LABELS}"
        if file.is_file() and suffix == ".npy" and not labels.is_file():
            raise data_refusal(file, f"has no labels beside it; wanted '{labels.name}'", "save them there")
        if file.is_file():
            return [file, labels] if suffix == ".npy" else [file]
    there = shown(", ".join(sorted(path.name for path in folder.iterdir())[:4]))
    wanted = ", ".join(name + suffix for suffix in SUFFIXES)
    raise data_refusal(folder, f"holds {there}; wanted one of {wanted}", f"save the split {name!r} there")


def _labels_alone(file: Path, task: Task) -> Any:
    return labelled((torch.empty(0), _array(file, task)), task.name)[1]


def _array(file: Path, task: Task) -> Any:
    import numpy as np

    try:
        return np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise data_refusal(file, f"is not an array: {error}", "save the labels with numpy.save") from error


def _checked(inputs: Any, labels: Tensor, file: Path, task: Task) -> Tensor:
    """The labels (N,), after a look at them and at the number of inputs."""
    parts = inputs if isinstance(inputs, dict) else {"inputs": inputs}
    if wrong := [name for name, part in parts.items() if not isinstance(part, Tensor) or part.ndim == 0]:
        raise data_refusal(file, f"holds a {wrong[0]!r} that is no list of inputs", "save tensors (N, …) with labels")
    if not parts:
        raise data_refusal(file, "holds labels alone", "save `inputs` and `labels`")
    if labels.ndim != 1 or any(len(part) != len(labels) for part in parts.values()):
        shapes = ", ".join(f"{name} {tuple(part.shape)}" for name, part in [*parts.items(), ("labels", labels)])
        raise data_refusal(file, f"holds {shapes}; wanted N inputs and labels (N,)", "save one label for each input")
    if size(inputs) == 0:
        raise data_refusal(file, "holds no input", "save at least one")
    classes = len(task.classnames)
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        found = f"holds labels from {int(labels.min())} to {int(labels.max())}, but there are {classes} class names"
        raise data_refusal(file, found, "count labels from 0, and name every class")
    return labels


def _single(inputs: Any) -> Any:
    """Floating-point numbers as float32; whole numbers as they are."""
    if isinstance(inputs, dict):
        return {name: _single(part) for name, part in inputs.items()}
    return inputs.float() if inputs.is_floating_point() else inputs


SOURCE = Source("tensors (train.pt, test.pt; or .safetensors, .npy)", found, _load, _problems, _count)
