"""How far the merged model's representation is from the experts', before and after the repair, layer by layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from suture.core.batches import Forward, Inputs, to_device
from suture.core.progress import Track, untracked
from suture.errors import ConfigError
from suture.repairs.model import SurgeryModel
from suture.repairs.network import FINAL, Block, Blocks, Network, by_place, find_blocks, places_of, position_mean
from suture.repairs.problem import Experts, Problem, split

_SEPARATE = 1e-12


@dataclass(frozen=True)
class Distances:
    """(task, place), one number each: the mean over inputs and dimensions of |model − expert|, and linear CKA."""

    l1: Float[Tensor, "task place"]
    cka: Float[Tensor, "task place"]


@dataclass(frozen=True)
class Representation:
    """The merged and the repaired model beside the experts.

    `places`: the blocks, by path, and the final feature; a block's representation is its mean over positions.
    `scatter`: task → {"merged", "repaired", "expert"} → (input, 2), the final features projected onto the two main axes
    of all three together; `explained`: task → the share of the variance that these axes hold.
    """

    tasks: tuple[str, ...]
    places: tuple[str, ...]
    before: Distances
    after: Distances
    scatter: dict[str, dict[str, Float[Tensor, "input 2"]]]
    explained: dict[str, float]


def representation(
    model: SurgeryModel,
    experts: Experts,
    inputs: Mapping[str, Inputs],
    *,
    forward: Forward | None = None,
    blocks: Blocks = None,
    batch_size: int = 64,
    track: Track = untracked,
) -> Representation:
    """Compare a repaired model with its experts on each task's inputs; three forward passes each.

    `blocks` says where to look beside the final feature: see `find_blocks`; an empty list for the final feature alone.
    By default where modules are, or else where blocks are found, if any. `forward` is the model's own by default.
    """
    forward = forward or model.network.encode
    problem = Problem(model.network.module, experts, inputs, forward, encode_batch=batch_size, track=track)
    looked = _where(model, problem, blocks)
    found: dict[str, list[Tensor]] = {"before": [], "after": []}
    scatter, explained, places = {}, {}, tuple(places_of(looked))
    for task in problem.tasks:
        expert = by_place(problem.expert_rows(task, inputs[task], looked), looked)
        merged = by_place(problem.merged_rows(task, inputs[task], looked), looked)
        repaired = by_place(_repaired_rows(model, task, inputs[task], looked, forward, batch_size), looked)
        for rows in (expert, merged):
            rows[-1] = model.repair_at[FINAL].prepared(rows[-1])
        for key, rows in (("before", merged), ("after", repaired)):
            found[key].append(torch.stack([_distance(a, b) for a, b in zip(rows, expert, strict=True)]))
        last = {"merged": merged[-1], "repaired": repaired[-1], "expert": expert[-1]}
        scatter[task], explained[task] = project(last)
    before, after = (Distances(*torch.stack(found[key]).unbind(-1)) for key in ("before", "after"))
    return Representation(tuple(problem.tasks), places, before, after, scatter, explained)


def linear_cka(x: Float[Tensor, "input one"], y: Float[Tensor, "input other"]) -> Float[Tensor, ""]:
    """Linear centred kernel alignment, in [0, 1]: ‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖), float64; 0 where one side is constant.

    https://arxiv.org/abs/1905.00414. It does not change under rotations and scalings of either side.

    >>> x = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.0, 1.0]])
    >>> round(linear_cka(x, -2 * x.flip(1)).item(), 6)
    1.0
    """
    x, y = (side.double() - side.double().mean(0) for side in (x, y))
    if len(x) < max(x.shape[1], y.shape[1]):
        gram = [side @ side.T for side in (x, y)]
        numerator, norms = (gram[0] * gram[1]).sum(), [g.norm() for g in gram]
    else:
        numerator, norms = (y.T @ x).square().sum(), [(side.T @ side).norm() for side in (x, y)]
    product = norms[0] * norms[1]
    return numerator / product if product > _SEPARATE else torch.zeros((), dtype=torch.float64)


def project(features: Mapping[str, Float[Tensor, "input dim"]]) -> tuple[dict[str, Tensor], float]:
    """Features of several models onto the two main axes of all of them together: name → (input, 2), float64.

    The sign of an axis is such that its largest entry is positive. Also the share of the variance that they hold.
    """
    rows = torch.cat([side.double() for side in features.values()])
    mean = rows.mean(0)
    _, values, axes = torch.linalg.svd(rows - mean, full_matrices=False)
    axes = torch.cat([axes, axes.new_zeros(2, rows.shape[1])])[:2]  # one dimension alone is padded
    signs = axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    axes, total = axes * signs, values.square().sum()
    share = (values[:2].square().sum() / total).item() if total > 0 else 1.0
    return {name: (side.double() - mean) @ axes.T for name, side in features.items()}, share


def _where(model: SurgeryModel, problem: Problem, blocks: Blocks) -> tuple[Block, ...]:
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
        return ()  # a module without lists of blocks has its final feature


@torch.no_grad()
def _repaired_rows(
    model: SurgeryModel, task: str, inputs: Inputs, looked: tuple[Block, ...], forward: Forward, batch_size: int
) -> Tensor:
    """Like `Problem.rows`, with the corrections on the way."""
    places = {block.path: block for block in (*looked, *model.network.blocks)}
    network = Network(model.network.module, forward, list(places.values()))
    names, wanted, repairs = places_of(network.blocks), set(places_of(looked)), model.repair_at
    means: list[Tensor] = []
    seen: list[Any] = []

    def visit(i: int, rows: Tensor) -> Tensor:
        repair = repairs.get(names[i])
        corrected = rows if repair is None else repair(rows, model.which(task))
        if names[i] in wanted:
            means.append(position_mean(corrected, seen[0]))
        return corrected

    found = []
    for batch in split(inputs, batch_size):
        means.clear()
        seen[:] = [to_device(batch, network.device)]
        network(seen[0], visit)
        found.append(torch.cat(means, dim=1).cpu())
    return torch.cat(found)


def _distance(one: Tensor, other: Tensor) -> Float[Tensor, "2"]:
    return torch.stack([(one.double() - other.double()).abs().mean(), linear_cka(one, other)])
