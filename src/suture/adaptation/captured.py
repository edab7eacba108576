"""A step's work on the device: as it is, or recorded as a CUDA graph and replayed with one launch.

A step of AdaMerging is over a thousand small operations, and a GPU waits for their launches. Where shapes stay the
same, the whole step can be recorded: the merge, the passes, and the products of gradient and task vectors.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from suture.adaptation.merged_model import MergedModel
from suture.adaptation.network import Network
from suture.adaptation.passes import Part, Pass
from suture.adaptation.sharded_model import ShardedModel
from suture.core.progress import Profile
from suture.errors import one_line

log = logging.getLogger(__name__)
_PLAIN_FIRST = 2  # plain steps before a recording: libraries choose their kernels in the first ones
_CLOSE = 1e-3  # the relative distance of a replayed step from a plain one, whose sums may be added in another order


#: From a function on the device to one that repeats its operations, and the tensor into which these write its result.
Recorder = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


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
        self._recorded: tuple[Any, _Recording] | None = None

    def __call__(self, coefficients: Tensor, work: Sequence[Pass]) -> Tensor:
        """One step with these coefficients (task, tensor) on these inputs."""
        shapes = _shapes(work) if self.recorder else None
        if self._recorded is not None and self._recorded[0] == shapes:
            with self.profile("steps as a CUDA graph"):
                return self._recorded[1].replay(self._sent(coefficients), work)
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
        try:
            recording = _Recording(self.recorder, self._whole, self._sent(coefficients), work)
            replayed = recording.replay(self._sent(coefficients), work)
            distance = float((replayed - plain).norm() / plain.norm().clamp_min(torch.finfo(plain.dtype).tiny))
            if not distance <= _CLOSE:
                raise RuntimeError(f"a replayed step is off by {distance:.1e}")
        except Exception as error:  # whatever a network does that cannot be recorded
            log.warning("AdaMerging runs without a CUDA graph: %s", one_line(error))
            self.recorder = None
            return
        self._recorded = (shapes, recording)

    def _sent(self, coefficients: Tensor) -> Tensor:
        assert isinstance(self.model, MergedModel)
        return self.model.sent(coefficients)

    def _whole(self, sent: Tensor, work: Sequence[Pass]) -> Tensor:
        assert isinstance(self.model, MergedModel)
        self.model.write_sent(sent)
        return self._after_writing(work)


class _Recording:
    """A recorded step with the memory of its coefficients and inputs, which are copied there before each replay."""

    def __init__(
        self,
        recorder: Recorder,
        step: Callable[[Tensor, Sequence[Pass]], Tensor],
        sent: Tensor,
        work: Sequence[Pass],
    ):
        self._sent = sent.clone()
        self._work = [[part._replace(inputs=_map(torch.clone, part.inputs)) for part in parts] for parts in work]
        self._repeat, self._packed = recorder(lambda: step(self._sent, self._work))

    def replay(self, sent: Tensor, work: Sequence[Pass]) -> Tensor:
        self._sent.copy_(sent)
        for mine, given in zip(_parts(self._work), _parts(work), strict=True):
            for kept, tensor in zip(_tensors(mine.inputs), _tensors(given.inputs), strict=True):
                kept.copy_(tensor)
        self._repeat()
        return self._packed


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
    return _cuda_graph


def _cuda_graph(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # the recording keeps memory of its own
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        function()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        packed = function()
    return graph.replay, packed


def _parts(work: Sequence[Pass]) -> list[Part]:
    return [part for parts in work for part in parts]


def _shapes(work: Sequence[Pass]) -> Any:
    """The shapes, tasks and shares that a recording fits; None for inputs that are more than tensors."""
    shapes = []
    for parts in work:
        for part in parts:
            tensors = _tensors(part.inputs)
            if part.target is not None or not tensors or not all(isinstance(each, Tensor) for each in tensors):
                return None
            shapes.append((part.task, part.share, *((tuple(each.shape), each.dtype) for each in tensors)))
        shapes.append(None)
    return tuple(shapes)


def _map(function: Callable[[Tensor], Tensor], inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return {key: _map(function, value) for key, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return tuple(_map(function, value) for value in inputs)
    return function(inputs)


def _tensors(inputs: Any) -> list[Any]:
    """The tensors of a batch, in order, and whatever else is in it."""
    found: list[Any] = []
    _map(lambda each: found.append(each) or each, inputs)
    return found
