"""ESM: Essential Subspace Merging, on the directions in which an update moves a layer's outputs.

https://arxiv.org/abs/2602.20208. A task's essential subspace is that of the largest principal components of X Δᵀ, X the
inputs of the layer in the expert. The published code is followed where the paper differs: components are weighted by
λ^0.15, and both factors keep their mean singular value.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor, nn

from suture.adaptation.grams import InputGrams, Positions
from suture.adaptation.layer_calls import Layer
from suture.adaptation.layer_weights import matrix_of, write_layer
from suture.adaptation.loaded import InputMerge, LoadedModel, check_inputs
from suture.adaptation.regression_mean import layer_groups, merged_layers, watched
from suture.checkpoints import Source
from suture.core.batches import Forward, Inputs, call, size, split
from suture.core.progress import Track, untracked
from suture.errors import DataError
from suture.merging.methods.tsv_m import tsv_m
from suture.merging.spectra import polar_and_mean
from suture.merging.task_vectors import open_task_vectors

_POWER = 0.15  # of an eigenvalue: the weight of its direction
_DROPPED = 1e-12  # of the largest eigenvalue: directions that no input moves
_NUMBER = re.compile(r"(^|\.)\d+(?=\.)")  # of a block in a name
_ATTENTION_OUTPUT = re.compile(
    r"(out_proj|o_proj|attention\.output\.dense|attention\.dense|attn\.(c_)?proj|Attention\.o)\.weight$"
)


@torch.no_grad()
def esm(
    module: nn.Module,
    base: Source,
    models: Mapping[str, Source] | Sequence[Source],
    inputs: Mapping[str, Inputs],
    *,
    alpha: Annotated[float, Ge(0)] = 1.0,
    forward: Forward = call,
    frozen: Sequence[str] = (),
    mixed_dtypes: bool = False,
    batch_size: int = 64,
    track: Track = untracked,
) -> InputMerge:
    """Merge every linear layer and convolution in the essential subspaces of the tasks, all else by the mean.

    `module` provides the architecture, `inputs[task]` the unlabelled inputs of each model's task; the authors take 32.
    Projections after attention are merged by TSV-M. An update is then scaled by its norm over the mean norm of its type
    (the layers of the same name in other blocks), squared, and by `alpha`, which the authors search from 0 to 5.
    Further arguments and errors are those of `regmean`.
    """
    vectors = open_task_vectors(base, models, frozen=frozen, mixed_dtypes=mixed_dtypes)
    check_inputs(vectors, inputs)
    model = LoadedModel(module, vectors)
    batches = {task: list(split(rows, batch_size)) for task, rows in inputs.items()}
    model.load(next(iter(inputs)))
    layers = merged_layers(model, forward, next(iter(batches.values()))[0])
    origin = model.exact_base(layer.weight for layer in layers)
    updates: dict[Layer, Tensor] = {}
    groups = list(layer_groups(model, layers))
    with track("ESM", len(groups) * sum(map(size, inputs.values()))) as advance:
        for group in groups:
            parts: dict[Layer, Subspaces] = defaultdict(Subspaces)
            for task, rows in batches.items():
                model.load(task)
                grams = InputGrams()
                for batch in rows:
                    grams.add(watched(model.module, forward, batch, group), Positions.of(batch, size(batch)))
                    advance(size(batch))
                for layer in group:
                    delta = matrix_of(layer, {layer.weight: model.tensor(layer.weight)}) - matrix_of(layer, origin)
                    parts[layer].add(delta, *_inputs_of(layer, grams, task), len(batches))
            updates |= {layer: part.update(_ATTENTION_OUTPUT.search(layer.weight)) for layer, part in parts.items()}
    for layer, update in _scaled_by_type(updates).items():
        write_layer(layer, model.module, matrix_of(layer, origin) + alpha * update, None)
    return InputMerge(model.merged([layer.weight for layer in layers], alpha))


@dataclass
class Subspaces:
    """The task vectors of one layer and their essential subspaces, one task after another."""

    deltas: list[Float[Tensor, "group out in"]] = field(default_factory=list)
    directions: list[list[Float[Tensor, "out _"]]] = field(default_factory=list)
    weights: list[list[Float[Tensor, " _"]]] = field(default_factory=list)

    def add(self, delta: Float[Tensor, "group out in"], gram: Float[Tensor, "group in in"], count: int, tasks: int):
        """Add a task: its vector, and the Gram matrix of `count` inputs of its layer."""
        covariances = delta @ gram @ delta.mT / max(1, count - 1)
        found = [_principal(each, len(each) // tasks) for each in covariances]
        self.deltas.append(delta)
        self.directions.append([vectors for vectors, _ in found])
        self.weights.append([weights for _, weights in found])

    def update(self, attention_output: object = None) -> Float[Tensor, "group out in"]:
        """The merged update, before the scale of its type."""
        deltas = torch.stack(self.deltas, dim=1)
        if attention_output is not None:
            return torch.stack([tsv_m(each) for each in deltas])
        groups = zip(deltas, zip(*self.directions, strict=True), zip(*self.weights, strict=True), strict=True)
        return torch.stack([essential(each, directions, weights) for each, directions, weights in groups])


def essential(
    deltas: Float[Tensor, "task out in"],
    directions: Sequence[Float[Tensor, "out _"]],
    weights: Sequence[Float[Tensor, " _"]],
) -> Float[Tensor, "out in"]:
    """2 σ̄(E) σ̄(C) P(E) P(C): E the weighted directions of all tasks, C what their updates have along them.

    The rows of a task are scaled by its norm over the mean norm, squared, and so are the columns of C.
    """
    norms = torch.linalg.matrix_norm(deltas)
    if not norms.any() or not sum(map(len, weights)):
        return torch.zeros_like(deltas[0])
    left = torch.cat([vectors * own for vectors, own in zip(directions, weights, strict=True)], dim=1)
    sides = zip(deltas, directions, weights, (norms / norms.mean()).square(), strict=True)
    right = torch.cat([scale * own[:, None] * (vectors.mT @ delta) for delta, vectors, own, scale in sides])
    columns = right.norm(dim=0)
    right = right * (columns / columns.mean()).square()
    (factor, mean), (other, other_mean) = polar_and_mean(left), polar_and_mean(right)
    return 2 * mean * other_mean * factor @ other


def _principal(covariance: Float[Tensor, "out out"], count: int) -> tuple[Tensor, Tensor]:
    """The first principal directions (out, k), and their weights with mean 1."""
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
    kept = int((values > _DROPPED * values[:1].clamp_min(0)).sum())
    weights = values[:kept].pow(_POWER)
    return vectors[:, :kept], weights / weights.mean() if kept else weights


def _inputs_of(layer: Layer, grams: InputGrams, task: str) -> tuple[Tensor, int]:
    """Σ x xᵀ of the inputs of a layer, and their number; raises `DataError` if they are missing or not finite."""
    source = grams.sources.get(layer)
    if source is None or not grams.rows.get(source):
        raise DataError(f"Task {task!r}: no input reaches '{layer.weight}'. Remedy: give other inputs, or freeze it.")
    if not grams.grams[source].isfinite().all():
        raise DataError(
            f"Task {task!r}: the inputs of '{layer.weight}' are not finite. "
            "Remedy: check the inputs and the model, or run in float32."
        )
    return grams.grams[source], grams.rows[source]


def _scaled_by_type(updates: Mapping[Layer, Tensor]) -> dict[Layer, Tensor]:
    """Every update times its norm over the mean norm of its type, squared."""
    norms: dict[tuple[str, int, torch.Size], list[Tensor]] = defaultdict(list)
    kinds = {layer: (_NUMBER.sub(r"\1#", layer.weight), layer.start, each.shape) for layer, each in updates.items()}
    for layer, update in updates.items():
        norms[kinds[layer]].append(update.norm())
    means = {kind: torch.stack(each).mean().clamp_min(torch.finfo(torch.float64).tiny) for kind, each in norms.items()}
    return {layer: update * (update.norm() / means[kinds[layer]]).square() for layer, update in updates.items()}
