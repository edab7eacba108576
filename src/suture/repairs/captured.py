"""Steps of a repair as a CUDA graph: forward and backward passes and Adam's steps are replayed with one launch."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from suture.core.progress import Profile
from suture.core.recording import Recorder, Recording, check_replay, cuda_graph, shapes_of
from suture.errors import one_line
from suture.repairs.fitting import BatchLosses, Descent, Optimizer
from suture.repairs.problem import Problem

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Capture:
    """The recording of the steps of the repair `kind`, so many a launch; `profile` gets the seconds of the recorded."""

    kind: str
    recorder: Recorder
    profile: Profile
    steps_per_launch: int = 1

    def steps(self, descent: Descent, losses: BatchLosses, watched: bool) -> Callable[[range], Tensor]:
        """The function that takes steps and returns their losses (step, task), on the device."""
        for modules in descent.modules if watched else ():
            if modules.fired is None:  # replays write into memory that is there from the start
                modules.clear()
        return RecordedSteps(self, descent, losses)


class RecordedSteps:
    """The steps of a descent, recorded before the first, whose effect is undone, and then replayed.

    So an interrupted loop, which records anew, goes on to the same bits. The first replay is compared with a plain step
    on the same batches. Where steps cannot be recorded, or differ, they stay plain, and one line in the log says why.
    """

    def __init__(self, capture: Capture, descent: Descent, losses: BatchLosses):
        self.capture, self.descent, self.losses = capture, descent, losses
        self._recording: Recording | None = None
        self._shapes: Any = ()  # before it has been tried

    def __call__(self, steps: range) -> Tensor:
        batches = [[self.losses.batch(step, group) for group in self.descent.groups] for step in steps]
        if self._shapes == ():
            self._record(batches)
        if self._recording is None or shapes_of(batches) != self._shapes:
            return self._plain(batches)
        with self.capture.profile("repair steps as a CUDA graph"):
            return self._recording.replay(batches).clone()

    def _plain(self, batches: Sequence[Sequence[Any]]) -> Tensor:
        """The steps with these batches, one for each group of tasks."""
        return self.descent.step(*(partial(self._losses, step) for step in batches))

    def _losses(self, batches: Sequence[Any], group: slice) -> Tensor:
        return self.losses.of(batches[self.descent.groups.index(group)], group)

    def _record(self, batches: Sequence[Sequence[Any]]) -> None:
        put_back = self.descent.mark()
        try:
            self._shapes = shapes_of(batches)
            if self._shapes is None:
                raise TypeError("a batch is more than tensors")
            plain = self._with_gradients(self._plain(batches))
            put_back()
            recording = Recording(self.capture.recorder, self._plain, batches)
            put_back()
            check_replay(self._with_gradients(recording.replay(batches)), plain)
            self._recording = recording
        except Exception as error:  # whatever a network does that cannot be recorded
            log.warning("repair=%s runs without a CUDA graph: %s", self.capture.kind, one_line(error))
            self.descent.drop_gradients()
        put_back()

    def _with_gradients(self, losses: Tensor) -> Tensor:
        gradients = [p.grad.flatten() for p in self.descent.parameters if p.grad is not None]
        return torch.cat([losses.flatten(), *gradients])


def capture_of(kind: str, problem: Problem, optimizer: Optimizer, steps_per_launch: int = 1) -> Capture | None:
    """The recording of a repair's steps; None, with a line in the log, where that is not possible."""
    recorder, reason = recorder_on(problem.device), None
    if recorder is None:
        reason = "it needs a GPU"
    elif problem.team.world > 1:
        reason = "several processes add up their gradients in every step"
    elif optimizer != "adam":
        reason = f"optimizer={optimizer} takes the tasks' steps one after another"
    if recorder is None or reason is not None:
        log.warning("repair=%s runs without a CUDA graph: %s", kind, reason)
        return None
    return Capture(kind, recorder, problem.profile, steps_per_launch)


def recorder_on(device: torch.device) -> Recorder | None:
    return cuda_graph if device.type == "cuda" else None
