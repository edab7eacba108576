"""Slopes of this machine: seconds for an input, for a byte of models; measured once for each model, and cached."""

import json
import os
import platform
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from suture.core.batch_sizes import fixed_size
from suture.core.batches import size, take, to_device
from suture.core.machine import peak_memory
from suture.errors import OutputError
from suture.evaluation import TaskInputs
from suture.evaluation.inputs import task_inputs
from suture.merging.compatibility import spec_of
from suture.merging.merge import merge_task_vectors
from suture.pipeline.adamerging import AdaMerging
from suture.pipeline.context import Context
from suture.pipeline.models import Models
from suture.pipeline.settings import Settings
from suture.storage.atomic import write_text
from suture.storage.cache import cache_directory, digest
from suture.storage.speeds import read_speed, timed, write_speed

_PART = 8  # of a model's tensors, one in so many is merged to measure the method
_SMALL = 1 << 28  # bytes of models that are merged whole to measure it
_REPEATS = 2
_FEW = 256  # inputs of the forward passes that are timed


@dataclass(frozen=True)
class Slopes:
    """`forward` and `backward` (forward and backward passes) are seconds an input, `vectors` seconds for a byte of task
    vectors in a step of AdaMerging, `merging` seconds for a byte of the inputs of a static merge. `read` and `write`
    are the disks' bytes a second, `host` and `device` the bytes held while a batch is scored.
    """

    forward: float = 0.0
    backward: float = 0.0
    vectors: float = 0.0
    merging: float = 0.0
    read: float = float("inf")
    write: float = float("inf")
    host: int = 0
    device: int = 0


def slopes(settings: Settings, models: Models) -> Slopes:
    """The slopes of a run's model, method, device and batch size: those that were measured before, or new ones.

    A measurement takes a few seconds: batches of the first task, a backward pass if the method has any, the merge of an
    eighth of the tensors, and 64 MB on each disk.
    """
    path = cache_directory() / "slopes" / f"{_key(settings, models)}.json"
    with suppress(OSError, ValueError, TypeError):
        return Slopes(**json.loads(path.read_text("utf-8")))
    measured = _measured(settings, models)
    with suppress(OSError, OutputError):  # a cache that cannot be written costs time, not the plan
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(asdict(measured)))
    return measured


def _key(settings: Settings, models: Models) -> str:
    """A hash of all that the slopes depend on."""
    specs = {name: [list(spec.shape), str(spec.dtype)] for name, spec in models.base.specs.items()}
    machine = [platform.node(), os.cpu_count(), torch.get_num_threads(), torch.__version__]
    machine += [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    method = [settings.method.label, str(dict(settings.method.knobs)), len(models.experts), settings.threads]
    files = [os.stat(models.files[0]).st_dev if models.files else 0, _disk_of(settings.output)]
    data = [str(settings.tasks[:1]), settings.batch_size, dict(settings.fabric)]
    return digest({}, [], specs, machine, method, files, json.loads(json.dumps(data, default=str)))


def _disk_of(path: Path) -> int:
    return next(folder for folder in path.absolute().parents if folder.exists()).stat().st_dev


def _measured(settings: Settings, models: Models) -> Slopes:
    read, write = read_speed(models.files), write_speed(settings.output)
    merging = 0.0 if settings.method.static is None else _merging(settings, models)
    if not settings.tasks or settings.tasks[0].score is not None:
        return Slopes(merging=merging, read=read, write=write)
    context = Context(settings.output, "", settings.fabric, settings.seed, fixed_size(settings.batch_size))
    encoder = models.new_encoder(context.device.device)
    count = min(fixed_size(settings.batch_size), _FEW)
    task = task_inputs(models.family, settings.tasks[0], first=count)
    learned = isinstance(settings.method, AdaMerging)
    backward = _backward(context, encoder, task, settings.method.batch_size) if learned else 0.0  # type: ignore[union-attr]
    vectors = _vectors(models) if learned else 0.0
    forward = _per_input(lambda: context.scorer.correct(encoder, task), len(task))
    return Slopes(forward, backward, vectors, merging, read, write, peak_memory().get("process", 0), _on_device())


def _per_input(function: Callable[[], Any], count: int) -> float:
    """Seconds an input, the first call, which allocates, left out."""
    function()
    return min(timed(function) for _ in range(_REPEATS)) / count


def _backward(context: Context, encoder: nn.Module, task: TaskInputs, batch_size: int) -> float:
    inputs = to_device(take(task.inputs, slice(0, batch_size)), context.device.device)

    def step() -> None:
        task.logits(context.device.call(encoder, inputs)).float().square().mean().backward()
        encoder.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    encoder.requires_grad_(True)
    seconds = _per_input(step, size(inputs))
    encoder.requires_grad_(False)
    return seconds


def _vectors(models: Models) -> float:
    """Seconds for a byte of task vectors that a step adds up, and multiplies with a gradient."""
    rows, row = torch.ones(4, 1 << 22), torch.ones(1 << 22)
    weights = torch.ones(4)
    seconds = min(timed(lambda: (weights @ rows, rows @ row)) for _ in range(1 + _REPEATS))
    return seconds / (rows.numel() * rows.itemsize)


def _merging(settings: Settings, models: Models) -> float:
    """Seconds for a byte of the inputs of a static merge with its wrappers, from some of the tensors."""
    whole = models.vectors(settings.method.frozen)
    names = sorted(whole.names, key=lambda name: (-whole.specs[name].numel, name))
    if sum(whole.specs[name].nbytes for name in names) * (1 + len(models.experts)) > _SMALL:
        names = names[::_PART]
    kept = {name: name for name in names}
    few = [each.select({name: name for name in kept if name in each}) for each in models.experts.values()]
    part = models.base.select(kept)
    vectors = type(whole)(part, dict(zip(models.experts, few, strict=True)), whole.frozen, models.threads)
    method, after = settings.method, getattr(settings.method, "after", ())
    assert method.static is not None
    merge = lambda: merge_task_vectors(vectors, method.static, method.knobs, None, after)  # type: ignore[arg-type]
    read = sum(spec_of(each, name).nbytes for each in (part, *few) for name in names if name in each)
    return _per_input(merge, max(1, read * method.static.times_read(method.knobs)))


def _on_device() -> int:
    return peak_memory().get("accelerator", 0)
