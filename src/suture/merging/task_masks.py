"""Masks for tasks: one update for all tasks, and one bit a weight and task that says whether the task takes it.

The weights of task t are θ₀ + γ_t m_t ⊙ u: u the update, m_t the task's bits, γ_t its scale. A file of masks is a
safetensors file beside the pretrained model:

    update/NAME   u, in the shape of the base's tensor NAME
    bits/NAME     uint8 (task, ⌈entries / 8⌉): the bits of m_t, entry 8 i + j as bit j (of value 2^j) of byte i
    scales        float64 (task,): γ_t
    metadata      task_masks: JSON with the kind, the tasks in order, and the sha256 of the base's merged tensors
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from suture.checkpoints import (
    Checkpoint,
    Source,
    TensorSpec,
    content_hash,
    open_checkpoint,
    save_checkpoint,
)
from suture.errors import CheckpointError, IncompatibleModels, check_known, shown
from suture.merging.overflow import refuse_overflow
from suture.merging.task_vectors import compute_dtype

UPDATE, BITS, SCALES = "update/", "bits/", "scales"
MASKS_FILE = "task_masks.safetensors"  # in the folder of a run or of a merge of files
_FACTS = "task_masks"
_REMEDY = "Remedy: name a file that TaskMasks.save or a run with method=tall_masks or emr_merging wrote."


@dataclass(frozen=True, eq=False)
class TaskMasks:
    """The weights of every task as θ₀ + γ_t m_t ⊙ u.

    `kind`: the method, "tall_masks" or "emr_merging". `base`: the pretrained model. `update`: name → u, in the base's
    dtype (float32 where that has 8 bits): rounding it moves a weight by less than rounding the weight does. `bits`:
    name → uint8 (task, ⌈entries / 8⌉). `scales`: float64 (task,). Tensors without an update are the base's. Arithmetic
    is in float32, or float64 for float64 tensors.

    >>> from suture.merging.masking import tall_masks
    >>> base, one, two = {"w": torch.zeros(3)}, {"w": torch.tensor([1.0, 2, 0])}, {"w": torch.tensor([0.0, -1, 3])}
    >>> masks = tall_masks(base, {"one": one, "two": two}, mask_threshold=1.0)
    >>> masks.for_task("one")["w"], masks.for_task("two")["w"]
    (tensor([1., 1., 0.]), tensor([0., 0., 3.]))
    """

    kind: str
    tasks: tuple[str, ...]
    base: Checkpoint = field(repr=False)
    update: Mapping[str, Tensor] = field(repr=False)
    bits: Mapping[str, Tensor] = field(repr=False)
    scales: Float[Tensor, " task"]

    def for_task(self, task: str, out: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The weights of one task: the base's names, shapes and dtypes; tied names share one tensor.

        `out` may hold tensors to write into, such as those of a memory-mapped file. Raises `ConfigError` for an unknown
        task, and `IncompatibleModels` for weights that are too large for their dtype.
        """
        index = self.index(task)
        scale = self.scales[index].item()
        return self._weights(lambda name: scale * self.mask(task, name).to(self._computed(name)), out)

    def average(self, out: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The mean of all tasks' weights, for use without a task; as `for_task`."""

        def share(name: str) -> Tensor:
            total = torch.zeros(self.update[name].shape, dtype=self._computed(name))
            for task, scale in zip(self.tasks, self.scales.tolist(), strict=True):
                total += scale * self.mask(task, name).to(total.dtype)
            return total / len(self.tasks)

        return self._weights(share, out)

    def _weights(self, share: Callable[[str], Tensor], out: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        specs = {name: spec for name, spec in self.base.specs.items() if name not in self.base.aliases}
        names = specs if out is None else [name for name in specs if name in out]
        result = {n: torch.empty(specs[n].shape, dtype=specs[n].dtype) if out is None else out[n] for n in names}
        for name, tensor in result.items():
            if name not in self.update:
                tensor.copy_(self.base[name])
                continue
            dtype = self._computed(name)
            merged = self.base[name].to(dtype) + share(name) * self.update[name].to(dtype)
            tensor.copy_(merged)
            refuse_overflow(name, merged, tensor)
        return result | {alias: result[name] for alias, name in self.base.aliases.items() if name in result}

    def _computed(self, name: str) -> torch.dtype:
        return compute_dtype(self.base.specs[name].dtype)

    def mask(self, task: str, name: str) -> Bool[Tensor, " *shape"]:
        """The mask of one task and tensor, in the tensor's shape."""
        shape, row = self.update[name].shape, self.bits[name][self.index(task)]
        bits = np.unpackbits(row.numpy(), bitorder="little", count=shape.numel())
        return torch.from_numpy(bits.view(np.bool_)).view(shape)

    def index(self, task: str) -> int:
        """The position of a task; raises `ConfigError` for an unknown one."""
        check_known("task", [task], self.tasks)
        return self.tasks.index(task)

    @property
    def entries(self) -> int:
        """The number of weights with a bit for every task."""
        return sum(tensor.numel() for tensor in self.update.values())

    @property
    def bytes_stored(self) -> int:
        """Bytes beside the pretrained model: the update, one bit a weight and task, one number a task."""
        return sum(t.nbytes for t in (*self.update.values(), *self.bits.values(), self.scales))

    @property
    def bytes_of_models(self) -> int:
        """Bytes that the merged tensors of all tasks' models would take, in the base's dtypes."""
        return len(self.tasks) * sum(self.base.specs[name].nbytes for name in self.update)

    def renamed(self, names: Mapping[str, str], base: Source) -> "TaskMasks":
        """The same masks under other names: name here → name in `base`."""
        update = {names[name]: tensor for name, tensor in self.update.items()}
        bits = {names[name]: tensor for name, tensor in self.bits.items()}
        return replace(self, base=open_checkpoint(base), update=update, bits=bits)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        beside: Mapping[str, Tensor] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Write update, bits and scales as one safetensors file, whole or not at all; the base is not in it.

        `beside` and `metadata` are further tensors and texts, which `load` passes over.
        """
        tensors = {UPDATE + name: tensor for name, tensor in self.update.items()}
        tensors |= {BITS + name: tensor for name, tensor in self.bits.items()}
        tensors |= {SCALES: self.scales, **(beside or {})}
        save_checkpoint(tensors, path, {**facts(self.kind, self.tasks, self.base, self.update), **(metadata or {})})

    @classmethod
    def load(cls, path: str | os.PathLike[str], base: Source) -> "TaskMasks":
        """Open a file of masks beside the base that they were made over; tensors are mapped, not read.

        `path` may also be the folder that a merge of files wrote, whose masks are in `task_masks.safetensors`.
        Raises `CheckpointError` for a file that holds no masks or is damaged, and `IncompatibleModels` for another
        base. Nothing in the file is ever executed.
        """
        file = open_checkpoint(Path(path) / MASKS_FILE if Path(path).is_dir() else path)
        kind, tasks, digest = _read_facts(file)
        names = [name.removeprefix(UPDATE) for name in file if name.startswith(UPDATE)]
        _check_shapes(file, names, len(tasks))
        opened = open_checkpoint(base)
        _check_base(file.label, opened, {name: file.specs[UPDATE + name] for name in names}, digest)
        update, bits = ({name: file[part + name] for name in names} for part in (UPDATE, BITS))
        return cls(kind, tasks, opened, update, bits, file[SCALES].clone())


def mask_specs(base: Checkpoint, names: Sequence[str], tasks: int) -> dict[str, TensorSpec]:
    """Shape and dtype of all tensors in a file of masks."""
    specs = {SCALES: TensorSpec((tasks,), torch.float64)}
    for name in names:
        spec = base.specs[name]
        specs[UPDATE + name] = TensorSpec(spec.shape, _update_dtype(spec.dtype))
        specs[BITS + name] = TensorSpec((tasks, -(-spec.numel // 8)), torch.uint8)
    return specs


def _update_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.itemsize > 1 else compute_dtype(dtype)


def facts(
    kind: str, tasks: Sequence[str], base: Checkpoint, names: Sequence[str] | Mapping[str, Any]
) -> dict[str, str]:
    """The metadata of a file of masks."""
    return {_FACTS: json.dumps({"kind": kind, "tasks": list(tasks), "base": _digest(base, names)})}


def _digest(base: Checkpoint, names: Iterable[str]) -> str:
    return content_hash(base.select({name: name for name in names}))


def _read_facts(file: Checkpoint) -> tuple[str, tuple[str, ...], str]:
    try:
        match json.loads(file.metadata.get(_FACTS, "null")):
            case {"kind": str(kind), "tasks": [*tasks], "base": str(digest)} if _are_names(tasks):
                return kind, tuple(tasks), digest
    except (ValueError, RecursionError):
        pass
    raise CheckpointError(f"'{file.label}' holds no masks for tasks: its metadata does not describe any. {_REMEDY}")


def _are_names(tasks: Sequence[Any]) -> bool:
    return bool(tasks) and all(isinstance(task, str) for task in tasks) and len(set(tasks)) == len(tasks)


def _check_shapes(file: Checkpoint, names: Sequence[str], tasks: int) -> None:
    """Raise `CheckpointError` unless every update has its bits, and there is a scale for each task."""
    wanted = {SCALES: TensorSpec((tasks,), torch.float64)}
    for name in names:
        update = file.specs[UPDATE + name]
        if not update.dtype.is_floating_point or update.dtype.itemsize == 1:
            _refuse(file, UPDATE + name, update, "numbers of 16 bits or more")
        wanted[BITS + name] = TensorSpec((tasks, -(-update.numel // 8)), torch.uint8)
    for key, spec in wanted.items():
        if file.specs.get(key) != spec:
            _refuse(file, key, file.specs.get(key), f"{spec.dtype} {list(spec.shape)}".removeprefix("torch."))
    if not (file[SCALES].isfinite().all() and names):
        _refuse(file, SCALES if names else UPDATE, None, "finite numbers and at least one update")


def _refuse(file: Checkpoint, key: str, found: TensorSpec | None, wanted: str) -> None:
    state = "is missing or not finite" if found is None else f"is {found.dtype} {list(found.shape)}"
    state = state.replace("torch.", "")
    raise CheckpointError(f"'{file.label}' is damaged: {shown(key)!r} {state}; wanted {wanted}. {_REMEDY}")


def _check_base(label: str, base: Checkpoint, updates: Mapping[str, TensorSpec], digest: str) -> None:
    remedy = "Remedy: give the pretrained model that the masks were made over."
    for name, spec in updates.items():
        own = base.specs.get(name)
        if own is None or own.shape != spec.shape:
            state = "is missing from" if own is None else f"has shape {own.shape} in"
            raise IncompatibleModels(
                f"'{shown(name)}' {state} '{base.label}', and shape {spec.shape} in '{label}'. {remedy}"
            )
    if _digest(base, updates) != digest:
        raise IncompatibleModels(f"'{base.label}' holds other weights than those '{label}' was made over. {remedy}")
