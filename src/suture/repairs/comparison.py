"""Distances between a model's representation and its experts', before and after the repair, layer by layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from suture.core.batches import Forward, Inputs, split, to_device
from suture.core.progress import Track, untracked
from suture.errors import ConfigError
from suture.repairs.model import SurgeryModel
from suture.repairs.network import FINAL, Block, Blocks, Network, by_layer, find_blocks, layers_of, position_mean
from suture.repairs.problem import Experts, Problem, layer_means
from suture.repairs.static_model import StaticModel

_SEPARATE = 1e-12


@dataclass(frozen=True)
class Distances:
    """`l1`: the mean over inputs and dimensions of |model − expert|; `cka`: linear CKA to the expert."""

    l1: Float[Tensor, "task layer"]
    cka: Float[Tensor, "task layer"]


@dataclass(frozen=True)
class Representation:
    """The merged and the repaired model compared with the experts.

    `layers`: the blocks, by path, and the final feature; a block's representation is its mean over positions.
    `scatter`: task → {"merged", "repaired", "expert"} → (input, 2), the final features projected onto the first two
    principal axes of all three together; `explained`: task → the share of the variance along each of these axes.
    """

    tasks: tuple[str, ...]
    layers: tuple[str, ...]
    before: Distances
    after: Distances
    scatter: dict[str, dict[str, Float[Tensor, "input 2"]]]
    explained: dict[str, tuple[float, float]]


def representation(
    model: SurgeryModel | StaticModel,
    experts: Experts,
    inputs: Mapping[str, Inputs],
    *,
    merged: nn.Module | None = None,
    forward: Forward | None = None,
    blocks: Blocks = None,
    batch_size: int = 64,
    track: Track = untracked,
) -> Representation:
    """Compare a repaired model with its experts on each task's inputs, in three forward passes.

    `merged` is the model before a repair of its own weights, which a `StaticModel` does not keep; modules beside the
    weights leave it as it was. Raises `ConfigError` for a `StaticModel` without it. `blocks` names the blocks to
    compare beside the final feature, as for `find_blocks`; an empty list means none. By default these are the repaired
    blocks, or else any that are found. `forward` is the model's own by default.
    """
    forward = forward or model.network.encode
    module = _before(model, merged)
    problem = Problem(module, experts, inputs, forward, encode_batch=batch_size, track=track)
    compared = _compared_blocks(model, problem, blocks)
    before, after = [], []
    scatter, explained = {}, {}
    for task in problem.tasks:
        expert = by_layer(problem.expert_rows(task, inputs[task], compared), compared)
        unrepaired = by_layer(problem.merged_rows(task, inputs[task], compared), compared)
        repaired = by_layer(_repaired_rows(model, task, inputs[task], compared, forward, batch_size), compared)
        for rows in (expert, unrepaired):
            rows[-1] = _prepared(model, rows[-1])
        before.append(_distances(unrepaired, expert))
        after.append(_distances(repaired, expert))
        last = {"merged": unrepaired[-1], "repaired": repaired[-1], "expert": expert[-1]}
        scatter[task], explained[task] = project(last)
    sides = [Distances(*torch.stack(side).unbind(-1)) for side in (before, after)]
    return Representation(tuple(problem.tasks), tuple(layers_of(compared)), sides[0], sides[1], scatter, explained)


def linear_cka(x: Float[Tensor, "input one"], y: Float[Tensor, "input other"]) -> Float[Tensor, ""]:
    """Linear centred kernel alignment, in [0, 1]: ‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖), float64; 0 where one side is constant.

    https://arxiv.org/abs/1905.00414. It is invariant to rotations and isotropic scalings of either side.

    >>> x = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.0, 1.0]])
    >>> round(linear_cka(x, -2 * x.flip(1)).item(), 6)
    1.0
    """
    x, y = (side.double() - side.double().mean(0) for side in (x, y))
    if len(x) < max(x.shape[1], y.shape[1]):
        gram = [side @ side.T for side in (x, y)]  # the smaller matrices of the two equal formulas
        numerator, norms = (gram[0] * gram[1]).sum(), [g.norm() for g in gram]
    else:
        numerator, norms = (y.T @ x).square().sum(), [(side.T @ side).norm() for side in (x, y)]
    product = norms[0] * norms[1]
    return numerator / product if product > _SEPARATE else torch.zeros((), dtype=torch.float64)


def project(features: Mapping[str, Float[Tensor, "input dim"]]) -> tuple[dict[str, Tensor], tuple[float, float]]:
    """Project several models' features onto the first two principal axes of all of them together.

    Returns name → (input, 2), float64, and the share of the variance along each axis. The sign of an axis is such that
    its largest entry is positive.
    """
    rows = torch.cat([side.double() for side in features.values()])
    mean = rows.mean(0)
    _, values, axes = torch.linalg.svd(rows - mean, full_matrices=False)
    axes = torch.cat([axes, axes.new_zeros(2, rows.shape[1])])[:2]  # padded for features of a single dimension
    signs = axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    axes, total = axes * signs, values.square().sum()
    shares = torch.cat([values.square(), values.new_zeros(2)])[:2] / total if total > 0 else values.new_tensor([1, 0])
    first, second = shares.tolist()
    return {name: (side.double() - mean) @ axes.T for name, side in features.items()}, (first, second)


def _before(model: SurgeryModel | StaticModel, merged: nn.Module | None) -> nn.Module:
    """The merged model without its repair."""
    if isinstance(model, SurgeryModel):
        return model.network.module
    if merged is None:
        raise ConfigError("A repair of the weights is compared with the model before it. Remedy: give merged=….")
    return merged


def _prepared(model: SurgeryModel | StaticModel, features: Tensor) -> Tensor:
    """The features as the repair's final modules take them."""
    return model.repair_at[FINAL].prepared(features) if isinstance(model, SurgeryModel) else features


def _compared_blocks(model: SurgeryModel | StaticModel, problem: Problem, blocks: Blocks) -> tuple[Block, ...]:
    if blocks is None and model.network.blocks:
        return model.network.blocks
    if blocks is not None and len(blocks) == 0:
        return ()
    first = problem.inputs[problem.tasks[0]]
    try:
        return find_blocks(model.network.module, first, forward=problem.forward, blocks=blocks)
    except ConfigError:
        if blocks is not None:
            raise
        return ()  # a module without lists of blocks is compared at its final feature


@torch.no_grad()
def _repaired_rows(
    model: SurgeryModel | StaticModel,
    task: str,
    inputs: Inputs,
    compared: tuple[Block, ...],
    forward: Forward,
    batch_size: int,
) -> Tensor:
    """As `Problem.rows`, for the repaired model."""
    if isinstance(model, StaticModel):
        network = Network(model.network.module, forward, compared)
        return torch.cat([layer_means(network, to_device(b, network.device)).cpu() for b in split(inputs, batch_size)])
    blocks = {block.path: block for block in (*compared, *model.network.blocks)}
    network = Network(model.network.module, forward, list(blocks.values()))
    encoded = [_repaired_means(model, task, network, compared, batch) for batch in split(inputs, batch_size)]
    return torch.cat(encoded)


def _repaired_means(
    model: SurgeryModel, task: str, network: Network, compared: tuple[Block, ...], batch: Any
) -> Tensor:
    layers, compared_layers = layers_of(network.blocks), set(layers_of(compared))
    repairs = model.repair_at
    inputs = to_device(batch, network.device)
    means: list[Tensor] = []

    def visit(i: int, rows: Tensor) -> Tensor:
        repair = repairs.get(layers[i])
        corrected = rows if repair is None else repair(rows, model.which(task))
        if layers[i] in compared_layers:
            means.append(position_mean(corrected, inputs))
        return corrected

    network(inputs, visit)
    return torch.cat(means, dim=1).cpu()


def _distances(model: Sequence[Tensor], expert: Sequence[Tensor]) -> Float[Tensor, "layer 2"]:
    pairs = zip(model, expert, strict=True)
    return torch.stack([torch.stack([(a.double() - b.double()).abs().mean(), linear_cka(a, b)]) for a, b in pairs])
