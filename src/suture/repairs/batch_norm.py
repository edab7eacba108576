"""Calibration of a BatchNorm layer: new statistics, and the scale and shift that belong to them.

The statistics of a merged model are averages of the experts', but describe none of their activations. They are measured
on the calibrated path: mean and variance over the inputs of all tasks, each task with the same share. An expert's layer
is x ↦ a·x + c by channel; written for the new statistics its scale is a·σ and its shift a·μ + c, and with these the
layer is solved like any norm.
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from suture.adaptation.layer_calls import Call, Layer, LayerCalls
from suture.adaptation.walk import Walk
from suture.core.batches import Reached
from suture.merging.batch_norm import Moments
from suture.repairs.anchored import NormEquations


def calibrate_batch_norm(
    layer: Layer,
    block: int,
    students: Mapping[str, Walk],
    experts: Mapping[str, Mapping[str, Tensor]],
    anchors: Mapping[str, Tensor],
    ridge: float,
) -> None:
    """Measure and solve one layer of a block, behind layers that are calibrated already; writes into the module."""
    path = layer.weight.rpartition(".")[0]
    module: Any = next(iter(students.values())).module.get_submodule(path)
    moments = {task: _moments(walk, layer, block) for task, walk in students.items()}
    mean = torch.stack([m[1] for m in moments.values()]).mean(0)
    square = torch.stack([m[2] + (m[1] - mean).square() for m in moments.values()]).mean(0)
    count = sum(m[0] for m in moments.values())
    spread = square * count / max(1, count - 1)  # unbiased, as torch measures it
    deviation = (spread + module.eps).sqrt()
    with torch.no_grad():
        module.running_mean.copy_(mean)
        module.running_var.copy_(spread)
        scale, shift = f"{path}.weight".lstrip("."), f"{path}.bias".lstrip(".")
        if scale not in anchors or shift not in anchors:
            return
        equations = NormEquations()
        for task, (_, own, variance) in moments.items():
            z = (own - mean) / deviation
            squares = (variance + (own - mean).square()) / deviation.square()
            state = {name: tensor.double() for name, tensor in experts[task].items() if name.startswith(path)}
            slope = state[scale] / (state[f"{path}.running_var".lstrip(".")] + module.eps).sqrt()
            level = state[shift] - slope * state[f"{path}.running_mean".lstrip(".")]
            equations.add(squares, z, slope * deviation, slope * mean + level)
        weight, bias = equations.solve(anchors[scale], anchors[shift], ridge)
        module.weight.copy_(weight)
        module.bias.copy_(bias)


def _moments(walk: Walk, layer: Layer, block: int) -> tuple[int, Tensor, Tensor]:
    """Number of values, mean and variance of each channel of a layer's inputs."""
    moments = Moments()

    def see(call: Call) -> None:
        if call.layer == layer:
            moments.add(call.rows()[0])
            raise Reached

    for batch in range(len(walk.batches)):
        with suppress(Reached):
            walk.run(block, batch, LayerCalls(walk.module, see, with_norms=True))
    return moments.count, moments.mean, moments.squares / moments.count
