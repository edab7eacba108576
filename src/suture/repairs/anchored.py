"""Anchored least squares: a layer's weights from sums over the inputs of all tasks. https://arxiv.org/abs/2605.13030

The sums of one task are gathered first (`TaskSums`), because a task's share in the solution depends on the size of its
own Gram matrix, and are then added to those of the other tasks (`LayerSums`). Everything is in float64; only products
of float32 inputs may be computed in float32, batch by batch.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from suture.adaptation.grams import Positions, counted, gram, product
from suture.adaptation.layer_calls import Call, Layer
from suture.adaptation.layer_weights import matrix_of
from suture.errors import ConfigError

_SMALLEST = 1e-8
_JITTER = 2e-7  # of the ridge: 1e-8 at the default, as in the authors' code
_DETERMINANT = 1e-8
_SINGULAR = 1e12  # the condition number from which a solution is not to be trusted
Calls = Mapping[Layer, Sequence[Call]]


@dataclass
class Matrix:
    """The sums of one task for a matrix or a kernel: Σω, Σω x_s, Σω y_e and Σω x_s y_eᵀ, in groups.

    x_s are the student's inputs and y_e the expert's outputs, with its bias. `unpaired`: the two paths have different
    rows, as where each chooses experts, so there is no y_e.
    """

    source: Layer
    weight: float = 0.0
    rows: int = 0
    inputs: Any = 0.0
    outputs: Any = 0.0
    cross: Any = 0.0
    unpaired: bool = False


@dataclass
class Norm:
    """The sums of one task for a norm, by channel: Σω, Σω z² and Σω z."""

    weight: float = 0.0
    squares: Any = 0.0
    values: Any = 0.0


class TaskSums:
    """The sums of one task over batches, for all layers of a block. Layers with the same inputs share a Gram matrix."""

    def __init__(self, *, double: bool, full: frozenset[Layer] = frozenset()):
        self.double, self.full = double, full
        self.layers: dict[Layer, Matrix | Norm] = {}
        self.grams: dict[Layer, Tensor] = {}

    def add(self, student: Calls, expert: Calls, positions: Positions) -> None:
        """Add one batch."""
        sources: dict[Any, Layer] = {}
        for layer, calls in student.items():
            if layer.kind == "norm":
                self._add_norm(layer, calls, positions)
            elif layer.kind in ("matrix", "conv"):
                key = (*(id(call.input) for call in calls), calls[0].window, layer.groups, layer in self.full)
                sums = self.layers.setdefault(layer, Matrix(sources.setdefault(key, layer)))
                assert isinstance(sums, Matrix)
                if sums.source != sources[key] and sums.source == layer:
                    sources[key] = layer  # it shared no input in an earlier batch
                if sums.source != sources[key]:
                    raise ConfigError(f"'{layer.weight}' shares its inputs with other layers only in some batches.")
                self._add_matrix(layer, sums, calls, expert.get(layer, ()), positions)

    def work(self) -> dict[Layer, int]:
        """The multiplications that the equations of all layers with one source of inputs take, by source."""
        work: dict[Layer, int] = defaultdict(int)
        for layer, each in self.layers.items():
            if isinstance(each, Matrix) and each.source in self.grams:
                work[each.source] += layer.size * self.grams[each.source].shape[-1] ** 2
        return dict(work)

    def to(self, device: torch.device) -> "TaskSums":
        """The same sums on another device."""
        for sums in self.layers.values():
            for name, value in vars(sums).items():
                if isinstance(value, Tensor):
                    setattr(sums, name, value.to(device))
        self.grams = {layer: each.to(device) for layer, each in self.grams.items()}
        return self

    def _add_norm(self, layer: Layer, calls: Sequence[Call], positions: Positions) -> None:
        sums = self.layers.setdefault(layer, Norm())
        assert isinstance(sums, Norm)
        for call in calls:
            for rows, _, part in counted(call, positions.of_call(call, full=False)):
                z = rows[0].double()
                weights = z.new_ones(len(z)) if part is None else part.to(z)
                sums.weight += float(weights.sum())
                sums.squares = sums.squares + weights @ z.square()
                sums.values = sums.values + weights @ z

    def _add_matrix(
        self,
        layer: Layer,
        sums: Matrix,
        calls: Sequence[Call],
        others: Sequence[Call],
        positions: Positions,
    ) -> None:
        same = not layer.routed and [c.positions for c in calls] == [other.positions for other in others]
        sums.unpaired |= not same
        for call, other in zip(calls, others if same else [None] * len(calls), strict=True):
            weights = positions.of_call(call, full=layer in self.full)
            for rows, results, part in counted(call, weights, other):
                x = rows.double() if self.double else rows.float()
                w = None if part is None else part.to(x)
                if sums.source == layer:
                    self.grams[layer] = _added(self.grams.get(layer), gram(x, w))
                weighed = x if w is None else x * w[:, None]
                sums.weight += x.shape[1] if w is None else float(w.sum(dtype=torch.float64))
                sums.rows += x.shape[1]
                sums.inputs = sums.inputs + weighed.sum(1).double()
                if results is not None:
                    y = results.to(x)
                    sums.cross = _added(sums.cross, product(weighed, y))
                    sums.outputs = sums.outputs + (y if w is None else y * w[:, None]).sum(1).double()


class Shares:
    """The shares of processes in adding up and solving the matrices of a block.

    Matrices with the same inputs go together, to the process that has the least work yet.
    """

    def __init__(self, world: int):
        self._loads = [0] * world
        self._processes: dict[Layer, int] = {}

    def deal(self, work: Mapping[Layer, int]) -> None:
        """Give sources that are new, those with the most work first, to processes; see `TaskSums.work`."""
        new = (source for source in work if source not in self._processes)
        for source in sorted(new, key=work.__getitem__, reverse=True):
            process = self._loads.index(min(self._loads))
            self._processes[source] = process
            self._loads[process] += work[source]

    def of(self, process: int, sums: TaskSums, expert: Mapping[str, Tensor]) -> tuple[TaskSums, dict[str, Tensor]]:
        """The part of a task's sums and of its expert's weights that a process needs; all need the sums of norms."""
        part = TaskSums(double=sums.double, full=sums.full)
        own = {source for source in sums.grams if self._processes[source] == process}
        part.grams = {source: sums.grams[source] for source in own}
        part.layers = {
            layer: each for layer, each in sums.layers.items() if isinstance(each, Norm) or each.source in own
        }
        names = {name for layer in part.layers for name in (layer.weight, layer.bias)}
        return part, {name: tensor for name, tensor in expert.items() if name in names}


class LayerSums:
    """The sums of all tasks for the layers of one block, and their solutions."""

    def __init__(self, *, ridge: float, mix: float):
        self.ridge, self.mix = ridge, mix
        self.layers: dict[Layer, MatrixEquations | NormEquations] = {}
        self.grams: dict[Layer, Tensor] = {}

    def add(self, task: TaskSums, expert: Mapping[str, Tensor]) -> None:
        """Add the sums of a task, with its expert's weights."""
        scales: dict[Layer, Tensor] = {}
        for layer, each in task.layers.items():
            sums = self.layers.setdefault(layer, NormEquations() if isinstance(each, Norm) else MatrixEquations())
            if isinstance(each, Norm):
                assert isinstance(sums, NormEquations)
                _add_norm(sums, layer, each, expert)
            elif each.weight > 0:
                assert isinstance(sums, MatrixEquations)
                if each.source not in scales:
                    covariance = task.grams[each.source] / each.weight
                    scales[each.source] = 1 / covariance.flatten(1).norm(dim=1).clamp_min(_SMALLEST)
                    task.grams[each.source] = covariance
                    weighed = covariance * scales[each.source][:, None, None]
                    self.grams[each.source] = _added(self.grams.get(each.source), weighed)
                scale = scales[each.source]
                self._add_matrix(sums, layer, each, task.grams[each.source], scale, expert, task.double)

    def _add_matrix(
        self,
        sums: "MatrixEquations",
        layer: Layer,
        each: Matrix,
        covariance: Tensor,
        scale: Tensor,
        expert: Mapping[str, Tensor],
        double: bool,
    ) -> None:
        weight = matrix_of(layer, expert)
        sums.source, sums.rows = each.source, sums.rows + each.rows
        mix = 0.0 if each.unpaired else self.mix
        means, bias = each.inputs / each.weight, _bias(layer, expert, weight).double()[:, 0]
        dtype = torch.float64 if double else torch.float32
        own = (covariance.to(dtype) @ weight.to(dtype).mT).double()  # Cov Wᵀ
        crossed = each.cross / each.weight - means[..., None] * bias[:, None]
        target = (1 - mix) * own + mix * crossed
        sums.right = sums.right + scale[:, None, None] * target
        outputs = (1 - mix) * (_times(weight, means) + bias) + mix * each.outputs / each.weight
        sums.outputs = sums.outputs + scale[:, None] * outputs
        sums.inputs = sums.inputs + scale[:, None] * means
        sums.scale = sums.scale + scale

    def solve(self, anchors: Mapping[str, Tensor], layers: Sequence[Layer]) -> "dict[Layer, Solution]":
        """The solutions of those layers of which there are sums."""
        factors: dict[Layer, Tensor | None] = {}
        solved = {}
        for layer in layers:
            sums = self.layers.get(layer)
            if isinstance(sums, NormEquations):
                shift = None if layer.bias is None else anchors[layer.bias].double()
                solved[layer] = Solution(*sums.solve(anchors[layer.weight].double(), shift, self.ridge))
                continue
            if sums is None or sums.source is None:  # another process has it, or every row was padding
                continue
            warnings: list[str] = []
            if sums.source not in factors:
                factors[sums.source] = self._factor(sums.source, sums.rows, warnings)
            factor = factors[sums.source]
            found = (None, None) if factor is None else self._solve_matrix(layer, sums, factor, anchors)
            solved[layer] = Solution(*found, tuple(warnings))
        return solved

    def _factor(self, source: Layer, rows: int, warnings: list[str]) -> Tensor | None:
        left = self.grams[source]
        width = left.shape[-1]
        if rows < width:
            warnings.append(
                f"'{source.weight}' has {rows} input rows for {width} columns: the ridge decides the rest. "
                "Remedy: more inputs."
            )
        left = left + self.ridge * (1 + _JITTER) * torch.eye(width, dtype=left.dtype, device=left.device)
        factor, failed = torch.linalg.cholesky_ex(left)
        diagonal = factor.diagonal(dim1=-2, dim2=-1)
        if failed.any() or bool((diagonal.amax(-1) / diagonal.amin(-1) > _SINGULAR**0.5).any()):
            warnings.append(f"'{source.weight}' stays as merged: its Gram matrix is singular. Remedy: a larger ridge.")
            return None
        return factor

    def _solve_matrix(
        self, layer: Layer, sums: "MatrixEquations", factor: Tensor, anchors: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        right = sums.right + self.ridge * matrix_of(layer, anchors).mT
        weight = torch.cholesky_solve(right, factor).mT
        if layer.bias is None:
            return weight, None
        anchor = _bias(layer, anchors, weight).double()[:, 0]
        shift = sums.outputs - _times(weight, sums.inputs) + self.ridge * anchor
        return weight, (shift / (sums.scale + self.ridge)[:, None]).flatten()


class Solution(NamedTuple):
    """A layer's weight (group, out, in) or (channel,), None if it stays as it is; its bias if it has one; warnings."""

    weight: Tensor | None
    bias: Tensor | None
    warnings: tuple[str, ...] = ()

    def to(self, device: torch.device) -> "Solution":
        """The same solution on another device."""
        weight, bias = (None if each is None else each.to(device) for each in self[:2])
        return Solution(weight, bias, self.warnings)


@dataclass
class MatrixEquations:
    """Σ over tasks of both sides of the equations of a matrix or a kernel."""

    rows: int = 0
    source: Layer | None = None
    right: Any = 0.0
    inputs: Any = 0.0
    outputs: Any = 0.0
    scale: Any = 0.0


@dataclass
class NormEquations:
    """Σ over tasks of both sides of the equations of a norm, by channel: E z², E z, and their right sides."""

    tasks: int = 0
    squares: Any = 0.0
    values: Any = 0.0
    right: Any = 0.0
    low: Any = 0.0

    def add(self, squares: Any, values: Any, scale: Any, shift: Any) -> None:
        """Add a task: E z² and E z of its inputs, and its expert's scale and shift."""
        self.tasks += 1
        self.squares, self.values = self.squares + squares, self.values + values
        self.right = self.right + squares * scale + values * shift
        self.low = self.low + values * scale + shift

    def solve(self, scale: Tensor, shift: Tensor | None, ridge: float) -> tuple[Tensor, Tensor | None]:
        """Scale and shift, drawn to these anchors; None for a norm without a shift."""
        first, right = self.squares + ridge, self.right + ridge * scale
        if shift is None:
            return right / first, None
        low, last = self.low + ridge * shift, self.tasks + ridge
        determinant = (first * last - self.values.square()).clamp_min(_DETERMINANT)
        return (last * right - self.values * low) / determinant, (first * low - self.values * right) / determinant


def _bias(layer: Layer, tensors: Mapping[str, Tensor], like: Tensor) -> Float[Tensor, "group 1 out"]:
    """A layer's bias for outputs (group, …, out), or zeros."""
    if layer.bias is None:
        return torch.zeros(layer.groups, 1, layer.size // layer.groups, dtype=like.dtype, device=like.device)
    part = tensors[layer.bias].detach().reshape(-1)[layer.start : layer.start + layer.size]
    return part.reshape(layer.groups, 1, -1)


def _add_norm(sums: NormEquations, layer: Layer, each: Norm, expert: Mapping[str, Tensor]) -> None:
    if each.weight == 0:  # every row was padding
        sums.tasks += 1
        return
    scale, shift = expert[layer.weight].double(), _shift(layer, expert)
    sums.add(each.squares / each.weight, each.values / each.weight, scale, shift)


def _shift(layer: Layer, tensors: Mapping[str, Tensor]) -> Any:
    return 0.0 if layer.bias is None else tensors[layer.bias].double()


def _added(total: Any, more: Tensor) -> Tensor:
    """The sum in float64."""
    return more.double() if not isinstance(total, Tensor) else total.add_(more)


def _times(weight: Float[Tensor, "group out in"], means: Float[Tensor, "group in"]) -> Float[Tensor, "group out"]:
    return (weight @ means[..., None])[..., 0]
