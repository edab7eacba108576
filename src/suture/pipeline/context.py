"""What a method that learns is given: the opened models, their encoder, the tasks' inputs, and how to run."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from suture.core.fabric import OneDevice, make_fabric, make_logger
from suture.core.progress import Profile, bar
from suture.core.team import launch
from suture.evaluation import Row, TaskInputs, evaluate_row
from suture.merging.task_vectors import TaskVectors
from suture.storage.resume import Resume
from suture.tasks import Split, Task

T = TypeVar("T")
FEW = 3  # steps of a fast_dev_run
Watch = Callable[[int, float, Tensor | None], None]  # step, loss, values


@dataclass
class Stage:
    """The surroundings of one learning method.

    `decode(split)` gives the tasks' inputs, `fingerprint()` the hashes of all that goes in, `folder` is where logs go.
    """

    vectors: TaskVectors
    build: Callable[[], nn.Module]
    tasks: tuple[Task, ...]
    decode: Callable[[Split], Mapping[str, TaskInputs]]
    fingerprint: Callable[[], Mapping[str, Any]]
    folder: Path
    fabric: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    batch_size: int = 256
    fast: bool = False
    profile: Profile = field(default_factory=Profile)
    found: dict[Path, int] = field(default_factory=dict)

    @cached_property
    def encoder(self) -> nn.Module:
        """The architecture, with the pretrained weights."""
        return self.build().eval()

    def unmatched_tasks(self) -> list[str]:
        """One line for each model that has no task of its name to learn from."""
        named = {task.name for task in self.tasks}
        return [
            f"Model '{name}' has no task of its name, so there are no inputs to learn its coefficients from. "
            "Remedy: add the task to the task pool, or take the model out of the model pool."
            for name in self.vectors.models
            if name not in named
        ]

    def inputs(self, split: Split) -> dict[str, TaskInputs]:
        """The decoded inputs of the tasks that have a model."""
        with self.profile("data loading"):
            decoded = self.decode(split)
        return {name: decoded[name] for name in self.vectors.models}

    def shortened(self, steps: int) -> int:
        """So many steps, or a few in a fast_dev_run."""
        return min(steps, FEW) if self.fast else steps

    def resume(self, cache_dir: str, work: Mapping[str, Any]) -> Resume:
        """The state file of this work, named after all that decides its result."""
        fast = str(self.batch_size if self.fast else "")  # it cuts the inputs
        told = json.dumps(self.fingerprint(), sort_keys=True)
        asked = {**work, "seed": str(self.seed), "fast_dev_run": fast, "inputs": told}
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
        resume = Resume(Path(cache_dir) / "resume" / f"{digest}.pt", asked)
        if state := resume.load():
            self.found[resume.path] = len(state["losses"])
        return resume

    @cached_property
    def one_device(self) -> OneDevice:
        """The first of the devices that were asked for."""
        return OneDevice(self.fabric)

    def run(self, function: Callable[[Any], T], devices: int = 1) -> T:
        """`function(fabric)` on the devices that were asked for; what it measured is in the profile."""
        told = lambda fabric: (function(fabric), dict(self.profile.seconds))
        value, seconds = launch(make_fabric(self.fabric, devices), told)
        self.profile.seconds.update(seconds)
        return value

    @contextmanager
    def watch(self, name: str, steps: int, resume: Resume, *, quiet: bool = False) -> Iterator[Watch]:
        """What to call after each step: a progress bar, and the logger with the metrics that people know.

        The steps of a loop that is taken up again are logged first. `quiet` is for all processes but the first.
        """
        if quiet:
            yield lambda step, loss, values: None
            return
        logger = make_logger(self.fabric, self.folder / "logs" / name)
        with bar(name, steps) as advance:

            def watch(step: int, loss: float, values: Tensor | None) -> None:
                advance(1)
                if logger is not None:
                    logger.log_metrics(_metrics(loss, values), step)

            for step, (loss, values) in enumerate(_steps_done(resume)):
                watch(step, loss, values)
            yield watch
        if logger is not None:
            logger.finalize("success")

    def score(self, name: str, module: nn.Module) -> Row:
        """One line of the accuracy table, on the test split."""
        return evaluate_row(name, module, self.inputs("test"), track=bar, forward=self.one_device.call)

    def taken_up(self) -> list[str]:
        """One line for each loop that did not begin at its start."""
        return [
            f"{count} step{'s' * (count > 1)} of a loop were taken up from {path}."
            for path, count in self.found.items()
        ]


def _steps_done(resume: Resume) -> Iterator[tuple[float, Tensor | None]]:
    """Loss and coefficients of each step that a state holds."""
    state = resume.load() or {"losses": []}
    losses = torch.as_tensor(state["losses"], dtype=torch.float64)
    values = state["history"][1:] if "history" in state else [None] * len(losses)
    for loss, value in zip(losses, values, strict=True):
        yield loss.nansum().item(), value


def _metrics(loss: float, values: Tensor | None) -> dict[str, Any]:
    if values is None:
        return {"train/loss": loss}
    low, high, mean = values.min(), values.max(), values.mean()
    weights = {"train/weight_max": high, "train/weight_min": low, "train/weight_mean": mean}
    return {"train/loss": loss, **{name: value.item() for name, value in weights.items()}}
