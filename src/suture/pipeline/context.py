"""The context of a run: devices, seed, batch size, logs, states of loops, and the time profile."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from suture.core.batch_sizes import AUTO, AutoSize, BatchSize, fixed_size
from suture.core.fabric import SHARDED, OneDevice, forks, launch, make_fabric, make_logger
from suture.core.progress import Profile, Track, bar, untracked
from suture.evaluation import Scorer
from suture.storage.resume import Resume

T = TypeVar("T")
FEW = 3  # steps of a fast_dev_run
_ROUNDED = {
    "tf32": "Products of float32 matrices ran in TF32 (fabric.tf32=true).",
    "channels_last": "Pictures and kernels had their channels last (fabric.channels_last=true).",
}
Watch = Callable[[int, float, Tensor | None], None]  # step, loss, values


@dataclass(frozen=True)
class Resumed:
    """A loop of which an earlier run of the same work did the first `steps`, in so many seconds; 0: not known."""

    name: str
    steps: int
    seconds: float

    def __str__(self) -> str:
        time = f"the table counts its {self.seconds:.1f} s" if self.seconds else "its time is not in the table"
        done = f"{self.steps:,} steps were" if self.steps > 1 else "1 step was"
        return f"{self.name}: {done} done by an earlier run of the same work; {time}."


@dataclass(frozen=True)
class Context:
    """The arguments of every stage of a run besides its models and inputs.

    `fingerprint` identifies the run's inputs: hashes of the models, and the tasks' keys. Logs are written below
    `folder`, and encodings are cached in `encodings` during the run. `resumed` are the loops that earlier runs began.
    `auto_size` finds batch sizes for batch_size=auto. `group`: Fabric with the processes that have a part of the
    weights each, inside `together`.
    """

    folder: Path
    fingerprint: str = ""
    fabric: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    batch_size: BatchSize = 256
    fast: bool = False
    profile: Profile = field(default_factory=Profile)
    encodings: Path | None = None
    resumed: list[Resumed] = field(default_factory=list)
    auto_size: AutoSize = field(default_factory=AutoSize)
    group: Any = None

    @cached_property
    def device(self) -> OneDevice:
        """The first of the run's devices."""
        return OneDevice(self.fabric)

    @property
    def sizes(self) -> BatchSize:
        """The number of inputs that are encoded or scored at once, or the search for it."""
        return self.auto_size if self.batch_size == AUTO else self.batch_size

    @property
    def scorer(self) -> Scorer:
        """The scorer with the run's batch size, device and precision."""
        return Scorer(self.sizes, self.track, self.device.call, self.replicas, self.group)

    @property
    def sharded(self) -> bool:
        """Whether weights are split over processes wherever models run; see `together`.

        Where the whole command was started for each process, only AdaMerging is in all of them.
        """
        devices = str(self.fabric.get("devices"))
        return self.fabric.get("strategy") == SHARDED and devices not in ("None", "1") and forks(self.fabric)

    @property
    def replicas(self) -> tuple[torch.device, ...]:
        """The accelerators that copies of a model are on, if they are several."""
        return () if self.sharded else self.device.replicas

    @property
    def first(self) -> bool:
        """Whether this process writes files and tells of progress: all but the others of a group."""
        return self.group is None or self.group.global_rank == 0

    @property
    def track(self) -> Track:
        """The progress bars, which the first process has."""
        return bar if self.first else untracked

    def shortened(self, steps: int) -> int:
        """The number of steps, limited to a few in a fast_dev_run."""
        return min(steps, FEW) if self.fast else steps

    def resume(self, name: str, cache_dir: str, work: Mapping[str, Any], steps: int = 0) -> Resume:
        """The state file of this work, named by a hash of everything that determines its result.

        `name` is what notes call the loop; `steps` is the number of steps of each of its stages, if it has any.
        """
        few = fixed_size(self.batch_size)  # inputs of each task in a fast_dev_run
        fast = str(few if self.fast else "")
        decisive = {**work, "seed": str(self.seed), "fast_dev_run": fast, "inputs": self.fingerprint}
        decisive |= {"device": self.device.device.type, "precision": self.device.precision}
        decisive |= {"devices": str(self.fabric.get("devices"))}
        digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]
        resume = Resume(Path(cache_dir) / "resume" / f"{digest}.pt", decisive)
        if state := resume.load():
            self.resumed.append(Resumed(name, _count(state, steps), resume.earlier or 0.0))
        return resume if self.first else resume.read_only()

    @property
    def seconds_before(self) -> float:
        """Seconds that earlier runs spent on the loops taken up so far."""
        return sum(each.seconds for each in self.resumed)

    def launch(self, function: Callable[[Any], T], devices: int = 1) -> T:
        """Run `function(fabric)` on the run's devices, and add the times that it measured to the profile."""

        def measured(fabric: Any) -> tuple[T, dict[str, float], list[Resumed]]:
            return function(fabric), dict(self.profile.seconds), self.resumed

        value, seconds, resumed = launch(make_fabric(self.fabric, devices), measured)
        self.profile.seconds.update(seconds)
        self.resumed[:] = resumed
        return value

    def together(self, function: Callable[["Context"], T]) -> T:
        """`function(context)`, in the processes that have a part of the weights each, if there are such.

        All of them make the call; the result is that of the first.
        """
        if self.group is not None or not self.sharded:
            return function(self)
        return self.launch(lambda fabric: function(replace(self, group=fabric)))

    @contextmanager
    def watch(self, name: str, steps: int, resume: Resume, *, quiet: bool = False) -> Iterator[Watch]:
        """Yields a function to call after each step, which advances a progress bar and logs metrics.

        The steps of a resumed loop are logged first. `quiet` is for all processes but the first.
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
        """One line for each resumed loop, for batch sizes that were found, and for keys of `fabric` with an effect."""
        told = [*(line for key, line in _ROUNDED.items() if self.fabric.get(key)), *self.auto_size.notes]
        if self.sharded:
            told.append("Weights were split over processes (fabric.strategy=fsdp). Representations were not compared.")
        return told + list(map(str, self.resumed))


def _count(state: Mapping[str, Any], steps: int) -> int:
    """The number of steps in a saved state, of a loop in stages of so many steps those of the earlier stages too."""
    return len(state["losses"]) if "losses" in state else state["stage"] * steps + len(state["inner"]["losses"])


def _steps_done(resume: Resume) -> Iterator[tuple[float, Tensor | None]]:
    """Loss and coefficients of each step in a saved state; nothing of a loop in stages, whose last alone is known."""
    state = resume.load() or {}
    if "losses" not in state:
        return
    losses = torch.as_tensor(state["losses"], dtype=torch.float64)
    values = state["history"][1:] if "history" in state else [None] * len(losses)
    for loss, value in zip(losses, values, strict=True):
        yield loss.nansum().item(), value


def _metrics(loss: float, values: Tensor | None) -> dict[str, Any]:
    if values is None:
        return {"train/loss": loss}
    weights = {"train/weight_max": values.max(), "train/weight_min": values.min(), "train/weight_mean": values.mean()}
    return {"train/loss": loss, **{name: value.item() for name, value in weights.items()}}
