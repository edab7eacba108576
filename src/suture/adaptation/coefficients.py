"""Merging coefficients: their layout over tensors, their initial values, and their files.

A coefficient belongs to a task and a column. A column is the whole model (task-wise), one tensor (layer-wise) or a
named group of tensors.
"""

import io
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from suture.checkpoints import open_checkpoint, save_checkpoint
from suture.errors import ConfigError, unknown_name
from suture.storage.atomic import write_bytes

Granularity = str | Sequence[str] | Mapping[str, str]

#: A tensor's name up to its first number: encoder.layers.3.mlp.weight is in the block encoder.layers.3
_BLOCK = (r"^(?:[^.\d][^.]*\.)*?\d+(?=\.)",)
_REST = "rest"
_SUFFIXES = (".pt", ".safetensors", ".npy")


@dataclass(frozen=True)
class Layout:
    """The assignment of tensors to columns: the i-th of `tensors` takes the coefficient of column `index[i]`.

    `columns` are the columns' names, or None for task-wise coefficients, which have no second axis.
    """

    tasks: tuple[str, ...]
    tensors: tuple[str, ...]
    columns: tuple[str, ...] | None
    index: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """(task,), or (task, column)."""
        return (len(self.tasks),) if self.columns is None else (len(self.tasks), len(self.columns))

    def spread(self, values: Tensor, *, clamp: bool = False, softmax: bool = False) -> Float[Tensor, "task tensor"]:
        """The coefficient of every task and tensor, differentiable in `values`."""
        return effective(values, clamp=clamp, softmax=softmax).reshape(len(self.tasks), -1)[:, list(self.index)]


@dataclass(frozen=True)
class Coefficients:
    """The factors of the task vectors, with names. values: (task,) or (task, layer), float64.

    `layers` names the tensors or groups of the second axis, or is None for task-wise coefficients.
    """

    values: Tensor
    tasks: tuple[str, ...]
    layers: tuple[str, ...] | None = None


def layout(granularity: Granularity, tasks: Sequence[str], tensors: Sequence[str]) -> Layout:
    """Assign tensors to columns.

    `granularity` is "task", "layer" (one column per tensor), "block" (names up to their first number), a list of
    regular expressions (one column per different match in the tensors' names), or a mapping column → regular
    expression. The first expression that matches counts; tensors without a match share the column "rest".
    Raises `ConfigError` for an unknown granularity, and for an expression that is invalid or matches nothing.

    >>> layout([r"layer\\d"], ["t"], ["layer1.w", "layer1.b", "head.w"]).columns
    ('layer1', 'rest')
    """
    if granularity == "task":
        return Layout(tuple(tasks), tuple(tensors), None, (0,) * len(tensors))
    if granularity == "layer":
        return Layout(tuple(tasks), tuple(tensors), tuple(tensors), tuple(range(len(tensors))))
    if isinstance(granularity, str) and granularity != "block":
        raise ConfigError(unknown_name("granularity", granularity, ["task", "layer", "block"]))
    column_of = _grouped(_BLOCK if granularity == "block" else granularity, tensors)
    columns = tuple(dict.fromkeys(column_of))
    return Layout(tuple(tasks), tuple(tensors), columns, tuple(columns.index(column) for column in column_of))


def effective(values: Tensor, *, clamp: bool = False, softmax: bool = False) -> Tensor:
    """The coefficients for the optimizer's values, of the same shape.

    `clamp` limits them to [0, 1], with no gradient outside; `softmax` makes those of a layer sum to 1 over tasks.
    """
    if clamp and softmax:
        raise ConfigError("clamp_weights=True and softmax=True were both given; softmax stays in [0, 1] by itself.")
    return values.clamp(0, 1) if clamp else values.softmax(0) if softmax else values


def initial_values(source: Any, arrangement: Layout) -> Tensor:
    """Initial values of the layout's shape, float64: one number for all, or whatever `load_coefficients` takes."""
    if isinstance(source, int | float):
        if not math.isfinite(source):
            raise ConfigError(f"init_values={source} is not a finite number.")
        return torch.full(arrangement.shape, float(source), dtype=torch.float64)
    if isinstance(source, Coefficients) and source.layers is None and arrangement.columns is not None:
        tasks = Layout(arrangement.tasks, arrangement.tensors, None, arrangement.index)
        return load_coefficients(source, tasks)[:, None].repeat(1, len(arrangement.columns))
    return load_coefficients(source, arrangement)


def save_coefficients(coefficients: Coefficients, path: str | os.PathLike[str]) -> None:
    """Save as `.pt` or `.safetensors`, with the names of tasks and layers, or as a bare array in `.npy`.

    The file is written whole or not at all. Raises `ConfigError` for any other suffix, and `OutputError` if the file
    cannot be written.
    """
    path, values = Path(path), coefficients.values.detach().cpu()
    names = {"tasks": list(coefficients.tasks), "layers": coefficients.layers and list(coefficients.layers)}
    if path.suffix == ".safetensors":
        save_checkpoint({"coefficients": values}, path, {key: json.dumps(value) for key, value in names.items()})
        return
    buffer = io.BytesIO()
    if path.suffix == ".pt":
        torch.save({"coefficients": values, **names}, buffer)
    elif path.suffix == ".npy":
        np.save(buffer, values.numpy())
    else:
        raise _unknown_suffix(path)
    write_bytes(path, buffer.getbuffer())


def load_coefficients(source: Any, arrangement: Layout) -> Tensor:
    """Coefficients of the layout's shape, float64, from a list, a tensor, `Coefficients`, or a file of any format.

    If the source has names, tasks and layers are put in the layout's order. Raises `ConfigError` for other tasks, other
    layers, another shape, or values that are not finite. Nothing is truncated or padded.
    """
    where = f"'{source}'" if isinstance(source, str | os.PathLike) else "The coefficients given"
    given = _read(source, where)
    values, shape = given.values, tuple(given.values.shape)
    if shape != arrangement.shape:
        raise ConfigError(f"{where}: shape {shape}, but {_described(arrangement)} need the shape {arrangement.shape}.")
    if not values.isfinite().all():
        raise ConfigError(f"{where}: not all values are finite numbers.")
    values = values[_order(given.tasks, arrangement.tasks, "task", where)]
    if arrangement.columns is not None:
        values = values[:, _order(given.layers or (), arrangement.columns, "layer", where)]
    return values.clone()


def _grouped(granularity: Sequence[str] | Mapping[str, str], tensors: Sequence[str]) -> list[str]:
    """The column of every tensor."""
    named = isinstance(granularity, Mapping)
    patterns = list(granularity.items()) if named else [(None, text) for text in granularity]
    compiled = [(column, _compiled(text)) for column, text in patterns]
    for _, pattern in compiled:
        if not any(pattern.search(name) for name in tensors):
            raise ConfigError(f"granularity: the pattern {pattern.pattern!r} is in no tensor's name.")
    return [_column(name, compiled) for name in tensors]


def _column(name: str, patterns: Sequence[tuple[str | None, re.Pattern[str]]]) -> str:
    for column, pattern in patterns:
        match = pattern.search(name)
        if match:
            return match.group() if column is None else column
    return _REST


def _compiled(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except (re.error, TypeError) as error:
        raise ConfigError(f"granularity: {text!r} is not a regular expression: {error}.") from None


def _read(source: Any, where: str) -> Coefficients:
    if isinstance(source, Coefficients):
        return source
    if not isinstance(source, str | os.PathLike):
        return Coefficients(_numbers(source, where), ())
    path = Path(source)
    readers = {".pt": _read_pt, ".safetensors": _read_safetensors, ".npy": _read_npy, ".np": _read_npy}
    if path.suffix not in readers:
        raise _unknown_suffix(path)
    if not path.is_file():
        raise ConfigError(f"{where}: there is no such file.")
    try:
        return readers[path.suffix](path, where)
    except ConfigError:
        raise
    except Exception as error:  # a damaged file can raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{where}: no coefficients can be read from it: {reason}") from None


def _read_pt(path: Path, where: str) -> Coefficients:
    content = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(content, dict):
        return _named(content["coefficients"], content.get("tasks"), content.get("layers"), where)
    return Coefficients(_numbers(content, where), ())


def _read_safetensors(path: Path, where: str) -> Coefficients:
    with open_checkpoint(path) as file:
        tasks, layers = (json.loads(file.metadata.get(key, "null")) for key in ("tasks", "layers"))
        return _named(file["coefficients"], tasks, layers, where)


def _read_npy(path: Path, where: str) -> Coefficients:
    return Coefficients(_numbers(np.load(path, allow_pickle=False), where), ())


def _named(values: Any, tasks: Sequence[str] | None, layers: Sequence[str] | None, where: str) -> Coefficients:
    return Coefficients(_numbers(values, where), tuple(tasks or ()), tuple(layers) if layers else None)


def _numbers(values: Any, where: str) -> Tensor:
    try:
        return torch.as_tensor(values).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(f"{where}: not an array of numbers.") from None


def _order(given: Sequence[str], expected: Sequence[str], kind: str, where: str) -> list[int]:
    """The index of each expected name among those given; the given order if the source has no names."""
    if not given:
        return list(range(len(expected)))
    missing = [name for name in expected if name not in given]
    if missing or len(given) != len(expected):
        shown = repr(missing[0]) if missing else f"{len(expected)} of {len(given)}"
        raise ConfigError(f"{where}: made for other {kind}s; {shown} is wanted, it has {', '.join(given[:8])}.")
    return [list(given).index(name) for name in expected]


def _described(arrangement: Layout) -> str:
    layers = "" if arrangement.columns is None else f" and {len(arrangement.columns)} layers"
    return f"{len(arrangement.tasks)} tasks{layers}"


def _unknown_suffix(path: Path) -> ConfigError:
    return ConfigError(f"'{path}': coefficients are kept in {', '.join(_SUFFIXES)} files, not in '{path.suffix}'.")
