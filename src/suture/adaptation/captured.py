"""A step's work on the device: as it is, or recorded as a CUDA graph and replayed with one launch.

A step of AdaMerging is over a thousand small operations. Recorded are the merge, the passes, and the products of
gradient and task vectors.
"""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from suture.adaptation.merged_model import MergedModel
from suture.adaptation.network import Network
from suture.adaptation.passes import Part, Pass
from suture.adaptation.sharded_model import ShardedModel
from suture.core.progress import Profile
from suture.core.recording import Recorder, Recording, check_replay, cuda_graph, shapes_of
from suture.errors import one_line

log = logging.getLogger(__name__)
_PLAIN_FIRST = 2  # plain steps before a recording: libraries choose their kernels in the first ones


class Steps:
    """Loss and gradient of one step after another, packed in one tensor on the device: the gradient, then the loss.

    With a `recorder`, a step is recorded after two plain ones, and replayed for inputs of the same shapes. It is first
    compared with a plain step on the same inputs. Where it cannot be recorded, or differs, steps stay plain, and one
    line in the log says why.
    """

    def __init__(
        self, model: MergedModel | ShardedModel, network: Network, profile: Profile, recorder: Recorder | None = None
    ):
        self.model, self.network, self.profile, self.recorder = model, network, profile, recorder
        self._seen: dict[Any, int] = {}
        self._recorded: tuple[Any, Recording] | None = None

    def __call__(self, coefficients: Tensor, work: Sequence[Pass]) -> Tensor:
        """One step with these coefficients (task, tensor) on these inputs."""
        shapes = _shapes(work) if self.recorder else None
        if self._recorded is not None and self._recorded[0] == shapes:
            with self.profile("steps as a CUDA graph"):
                return self._recorded[1].replay(self._sent(coefficients), _inputs(work))
        with self.profile("merging weights"):
            self.model.write(coefficients)  # θ = θ₀ + Σ λ τ
        packed = self._after_writing(work)
        if shapes is not None and self._recorded is None:
            self._seen[shapes] = self._seen.get(shapes, 0) + 1
            if self._seen[shapes] > _PLAIN_FIRST:
                self._record(coefficients, work, shapes, packed)
        return packed

    def _after_writing(self, work: Sequence[Pass]) -> Tensor:
        """∂L/∂θ, turned into ⟨∂L/∂θ, τ⟩ tensor by tensor."""
        loss = self.network.backward(work)
        gradient = self.model.gradient()
        return torch.cat([gradient.reshape(-1), loss.reshape(1).to(gradient)])

    def _record(self, coefficients: Tensor, work: Sequence[Pass], shapes: Any, plain: Tensor) -> None:
        """Record a step, replay it on the inputs of the plain one, and keep it if both agree."""
        assert self.recorder is not None
        outline = _with_inputs(work, [None] * len(_parts(work)))

        def step(sent: Tensor, inputs: Sequence[Any]) -> Tensor:
            assert isinstance(self.model, MergedModel)
            self.model.write_sent(sent)
            return self._after_writing(_with_inputs(outline, inputs))

        try:
            recording = Recording(self.recorder, step, self._sent(coefficients), _inputs(work))
            check_replay(recording.replay(self._sent(coefficients), _inputs(work)), plain)
        except Exception as error:  # whatever a network does that cannot be recorded
            log.warning("AdaMerging runs without a CUDA graph: %s", one_line(error))
            self.recorder = None
            return
        self._recorded = (shapes, recording)

    def _sent(self, coefficients: Tensor) -> Tensor:
        assert isinstance(self.model, MergedModel)
        return self.model.sent(coefficients)


def recorder_for(model: object, objective_compares: bool, independent: bool) -> Recorder | None:
    """The recorder of a model's steps, or None, with a line in the log, where they cannot be recorded."""
    reason = None
    if not isinstance(model, MergedModel) or model.device.type != "cuda":
        reason = "it needs one GPU for each copy of the model"
    elif model.separate:
        reason = "task vectors that are streamed, in factors or masked are merged tensor by tensor"
    elif objective_compares:
        reason = "the objective runs the experts in every step"
    elif not independent:
        reason = "the network draws random numbers, or looks at whole batches"
    if reason is not None:
        log.warning("AdaMerging runs without a CUDA graph: %s", reason)
        return None
    return cuda_graph


def _parts(work: Sequence[Pass]) -> list[Part]:
    return [part for parts in work for part in parts]


def _inputs(work: Sequence[Pass]) -> list[Any]:
    return [part.inputs for part in _parts(work)]


def _with_inputs(work: Sequence[Pass], inputs: Iterable[Any]) -> list[Pass]:
    """The same passes with other inputs."""
    remaining = iter(inputs)
    return [[part._replace(inputs=next(remaining)) for part in parts] for parts in work]


def _shapes(work: Sequence[Pass]) -> Any:
    """The shapes, tasks and shares that a recording fits; None for inputs that are more than tensors."""
    shapes = []
    for parts in work:
        for part in parts:
            own = shapes_of(part.inputs)
            if part.target is not None or own is None:
                return None
            shapes.append((part.task, part.share, *own))
        shapes.append(None)
    return tuple(shapes)
