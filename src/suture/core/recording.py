"""Functions of tensors, recorded as CUDA graphs and replayed with one launch.

A step of a loop is many small operations, and a GPU waits for their launches. Where shapes stay the same, all of a step
can be recorded.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

_CLOSE = 1e-3  # the relative distance of a replay from the function itself, whose sums may be added in another order

#: From a function on the device to one that repeats its operations, and the tensor into which these write its result.
Recorder = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


class Recording:
    """A recorded function with memory of its own for its arguments, which are copied there before each replay.

    Arguments are tensors, or mappings and sequences of tensors; everything else in them stays as it was recorded. The
    recorder runs the function, so what it changes is to be put back afterwards.
    """

    def __init__(self, recorder: Recorder, function: Callable[..., Tensor], *arguments: Any):
        self._arguments = _map(torch.clone, arguments)
        self._repeat, self._result = recorder(lambda: function(*self._arguments))

    def replay(self, *arguments: Any) -> Tensor:
        """The function's result for these arguments, in memory that the next replay overwrites."""
        pairs = zip(_leaves(self._arguments), _leaves(arguments), strict=True)
        own, given = zip(*(pair for pair in pairs if isinstance(pair[0], Tensor)), strict=True)
        torch._foreach_copy_(own, given)  # pyright: ignore[reportPrivateImportUsage]
        self._repeat()
        return self._result


def check_replay(replayed: Tensor, plain: Tensor) -> None:
    """Raise `RuntimeError` unless a replay has nearly the result of the function itself."""
    distance = float((replayed - plain).norm() / plain.norm().clamp_min(torch.finfo(plain.dtype).tiny))
    if not distance <= _CLOSE:
        raise RuntimeError(f"a replayed step is off by {distance:.1e}")


def shapes_of(inputs: Any) -> tuple[Any, ...] | None:
    """The shapes and dtypes that a recording fits; None for inputs that are more than tensors.

    >>> shapes_of({"pixels": torch.zeros(2, 3)})
    (((2, 3), torch.float32),)
    """
    leaves = _leaves(inputs)
    if not leaves or not all(isinstance(each, Tensor) for each in leaves):
        return None
    return tuple((tuple(each.shape), each.dtype) for each in leaves)


def cuda_graph(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """The `Recorder` of a GPU: the function runs once, so that libraries choose their kernels, and is then captured."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # the recording keeps memory of its own
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        function()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph.replay, result


def _map(function: Callable[[Any], Any], inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return {key: _map(function, value) for key, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return tuple(_map(function, value) for value in inputs)
    return function(inputs) if isinstance(inputs, Tensor) else inputs


def _leaves(inputs: Any) -> list[Any]:
    """The tensors of some inputs, in order, and whatever else is in them."""
    if isinstance(inputs, Mapping):
        return [leaf for value in inputs.values() for leaf in _leaves(value)]
    if isinstance(inputs, tuple | list):
        return [leaf for value in inputs for leaf in _leaves(value)]
    return [inputs]
