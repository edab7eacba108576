"""How and where one run computes: devices, seed, batch size, logs, states of loops, and where the time went."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from suture.core.fabric import OneDevice, launch, make_fabric, make_logger
from suture.core.progress import Profile, bar
from suture.evaluation import Scorer
from suture.storage.resume import Resume

T = TypeVar("T")
FEW = 3  # steps of a fast_dev_run
Watch = Callable[[int, float, Tensor | None], None]  # step, loss, values


@dataclass(frozen=True)
class Context:
    """What every stage of a run is given beside its models and inputs.

    `fingerprint` stands for all that goes into the run: hashes of the models, and the keys of the tasks. Logs go below
    `folder`. What models give for inputs is kept in `encodings` while the run lasts. `resumed`: state file → steps that
    a loop took up from it.
    """

    folder: Path
    fingerprint: str = ""
    fabric: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    batch_size: int = 256
    fast: bool = False
    profile: Profile = field(default_factory=Profile)
    encodings: Path | None = None
    resumed: dict[Path, int] = field(default_factory=dict)

    @cached_property
    def device(self) -> OneDevice:
        """The first of the devices that were asked for."""
        return OneDevice(self.fabric)

    @property
    def scorer(self) -> Scorer:
        """How models are scored."""
        return Scorer(self.batch_size, bar, self.device.call)

    def shortened(self, steps: int) -> int:
        """So many steps, or a few in a fast_dev_run."""
        return min(steps, FEW) if self.fast else steps

    def resume(self, cache_dir: str, work: Mapping[str, Any]) -> Resume:
        """The state file of this work, named after all that decides its result."""
        fast = str(self.batch_size if self.fast else "")  # it cuts the inputs
        decisive = {**work, "seed": str(self.seed), "fast_dev_run": fast, "inputs": self.fingerprint}
        decisive |= {"device": self.device.device.type, "precision": self.device.precision}
        decisive |= {"devices": str(self.fabric.get("devices"))}
        digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]
        resume = Resume(Path(cache_dir) / "resume" / f"{digest}.pt", decisive)
        if state := resume.load():
            self.resumed[resume.path] = len(state["losses"])
        return resume

    def launch(self, function: Callable[[Any], T], devices: int = 1) -> T:
        """`function(fabric)` on the devices that were asked for; the times that it measured are in the profile."""

        def measured(fabric: Any) -> tuple[T, dict[str, float]]:
            return function(fabric), dict(self.profile.seconds)

        value, seconds = launch(make_fabric(self.fabric, devices), measured)
        self.profile.seconds.update(seconds)
        return value

    @contextmanager
    def watch(self, name: str, steps: int, resume: Resume, *, quiet: bool = False) -> Iterator[Watch]:
        """The function to call after each step: it moves a progress bar and logs the metrics that people know.

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

    def notes(self) -> list[str]:
        """One line for each loop that did not begin at its start."""
        return [
            f"{count} step{'s' * (count > 1)} of a loop were taken up from {path}."
            for path, count in self.resumed.items()
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
