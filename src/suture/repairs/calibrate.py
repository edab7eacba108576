"""Feature calibration: a merged model's own weights, solved block by block to give what the experts' layers give.

https://arxiv.org/abs/2605.13030. Blocks are visited in forward order on two paths a task: the student's, through blocks
that are calibrated already, and the expert's own. Each block runs once uncalibrated on both, which gives the sums of
all its layers; then all of them are solved, and the student's path goes on through the solved block. Nothing is added
to the model.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from suture.adaptation.blocks import Block, submodule
from suture.adaptation.grams import Positions
from suture.adaptation.layer_calls import Call, Layer, LayerCalls
from suture.adaptation.layer_weights import write_layer
from suture.adaptation.walk import Store, Walk, make_plan, new_store, probe_of
from suture.core.batch_sizes import fixed_size
from suture.core.batches import device_of, size, split, to_device
from suture.core.fabric import Team
from suture.core.hosting import hosted_copy
from suture.core.knobs import value_between
from suture.core.replicas import in_turn
from suture.core.unread import resident
from suture.errors import ConfigError, DataError
from suture.merging.overflow import refuse_overflow
from suture.repairs.anchored import LayerSums, Shares, Solution, TaskSums
from suture.repairs.batch_norm import calibrate_batch_norm
from suture.repairs.calibrated_blocks import calibrated_blocks, silent_layers
from suture.repairs.expert_copies import ExpertCopies
from suture.repairs.problem import Problem
from suture.repairs.read_tokens import full_layers, reads_first_token_only
from suture.repairs.registry import repair_kind
from suture.repairs.results import RepairResult
from suture.repairs.static_model import StaticModel

Anchor = Annotated[float, Ge(0)]
_CPU = torch.device("cpu")
_DOUBLE_BELOW = 1e-3  # the ridge below which sums of float32 products are not exact enough
#: A task's sums for a block, its expert's weights there, and the layers that were seen.
_Found = tuple[TaskSums, dict[str, Tensor], dict[Layer, None]]


@repair_kind(paper="https://arxiv.org/abs/2605.13030", static=True)
def calibrate(
    problem: Problem,
    *,
    anchor: Anchor | Sequence[Anchor] = 2.2,
    ridge: Annotated[float, Gt(0)] = 0.05,
    mix: Annotated[float, Ge(0), Le(1)] = 0.25,
    other_tokens: Annotated[float, Ge(0), Le(1)] = 0.01,
    full: list[str] | None = None,
    num_passes: Annotated[int, Ge(1), Le(2)] = 1,
    second_anchor: Anchor | Sequence[Anchor] = (1.0, 2.0),
    second_mix: Annotated[float, Ge(0), Le(1)] = 1.0,
    blocks: str | list[str] | None = None,
) -> RepairResult:
    """Solve the layers of every block by least squares anchored at the merged weights; no labels, no gradients.

    Targets are what the expert's layer gives for `mix` · its own input + (1 − mix) · the student's input, and every
    solution is drawn by `ridge` to the pretrained weights + `anchor` · (merged − pretrained). An anchor may be several
    numbers, from the first block to the last, with straight lines between. Solved are the matrices, kernels and biases
    of linear layers and convolutions, the scales and shifts of norms, and for BatchNorm layers also the statistics,
    which are measured anew on the calibrated path. What lies outside of the blocks stays as merged, but for BatchNorm
    layers.

    Padding never counts. If only the first token of the last block is read, its other tokens have the weight
    `other_tokens`, except in the layers that feed keys and values: those whose names `full` lists, or by default those
    through which other tokens reach the feature. A second pass starts from the result of the first, with an anchor of
    at most `second_anchor`, because it diverges with more, and with `second_mix`. `blocks`: see `find_blocks`; in a
    module without a list of blocks every layer counts as one.
    """
    given = {"anchor": anchor, "second_anchor": second_anchor}
    student = _student(problem)
    chosen = calibrated_blocks(student, problem, blocks)
    anchors = [_by_block(name, value, len(chosen)) for name, value in given.items()]
    settings = _Settings(anchors[0], ridge, mix, other_tokens, None if full is None else tuple(full))
    warnings: list[str] = []
    if problem.base is None:
        warnings.append("There is no base, so weights are anchored at the merged ones. Remedy: repair(…, base=…).")
    for number in range(num_passes):
        if number:
            settings = replace(settings, anchor=tuple(map(min, *anchors)), mix=second_mix)
        with new_store(problem.cache) as store:
            lines = _Calibration(problem, student, chosen, settings, store).run()
        warnings += [line for line in lines if line not in warnings]
    model = StaticModel(student, problem.tasks, forward=problem.forward, kind="calibrate")
    losses = torch.zeros(0, len(problem.tasks), dtype=torch.float64)
    return RepairResult("calibrate", model, losses, warnings=tuple(warnings), passes=problem.passes)


@dataclass(frozen=True)
class _Settings:
    anchor: tuple[float, ...]  # of every block
    ridge: float
    mix: float
    other_tokens: float
    full: tuple[str, ...] | None


class _Calibration:
    """One pass over all blocks, which changes `student`."""

    def __init__(
        self, problem: Problem, student: nn.Module, blocks: Sequence[Block], settings: _Settings, store: Store
    ):
        self.problem, self.student, self.blocks = problem, student, blocks
        self.settings, self.store = settings, store
        number = fixed_size(problem.encode_batch)
        self.batches = {task: list(split(inputs, number)) for task, inputs in problem.inputs.items()}
        probe = to_device(probe_of(problem.inputs), device_of(student))
        self.plan = make_plan(student, problem.forward, [block.path for block in blocks], probe)
        self.experts = ExpertCopies(problem)
        batch_norm = any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in student.modules())
        self.team = Team() if batch_norm else problem.team  # its statistics are measured over all tasks at once
        self.students = [student] if batch_norm else _copies(student, problem)
        self._aliases = _aliases(student)
        self.full, self.others = self._tokens(probe)
        self.warnings: list[str] = []

    def run(self) -> list[str]:
        """Calibrate every block; returns warnings, one line each."""
        tasks, workers = list(self.batches), len(self.students)
        of_task = {task: self.students[i % workers] for i, task in enumerate(tasks)}
        students = {task: self._walk(each, task, self._device_of(each)) for task, each in of_task.items()}
        experts: dict[str, Walk] = {}
        with self.problem.track("Calibrating", len(self.blocks) * len(tasks)) as advance:
            for i in range(len(self.blocks)):
                with self._at_work(i):
                    total = LayerSums(ridge=self.settings.ridge, mix=self.settings.mix)
                    seen: dict[Layer, None] = {}
                    states = {}
                    sums_of = partial(self._task, i, students, experts)
                    for task, (sums, state, layers) in zip(tasks, self._shared(sums_of, tasks), strict=True):
                        states[task] = state
                        seen.update(layers)
                        total.add(sums, state)
                        advance(1)
                    self._solve(i, total, seen)
                    self._measure_batch_norms(i, students, seen, states)
                    self._go_on(i, students)
        for task in self.batches:
            self.problem.passes.merged += 2 * size(self.problem.inputs[task])
            self.problem.passes.experts += size(self.problem.inputs[task])
        return list(dict.fromkeys(line for lines in self.team.gather(self.warnings) for line in lines))

    @contextmanager
    def _at_work(self, i: int) -> Iterator[None]:
        """Inside the block, a block of a student that lies in a file is on the device; then its solution is written."""
        part = submodule(self.student, self.blocks[i].path)
        if not self.team.sharded:
            yield
            return
        with resident(part, self.problem.device, copied=True) as solved:
            yield
        if self.team.first_of_host:
            for name, tensor in part.named_parameters():
                tensor.copy_(solved[name])
        self.team.wait()

    def _shared(self, sums_of: Callable[[int, str], _Found], tasks: Sequence[str]) -> Iterator[_Found]:
        """The sums of every task, by several devices; of several processes each gets what it solves."""
        if self.team.world == 1:
            yield from in_turn(len(self.students), sums_of, tasks)
            return
        rank, world, shares = self.team.rank, self.team.world, Shares(self.team.world)
        for start in range(0, len(tasks), world):
            turn = tasks[start : start + world]
            sums, state, seen = sums_of(0, turn[rank]) if rank < len(turn) else (TaskSums(double=False), {}, {})
            outlines = self.team.gather((sums.work(), seen))
            for work, _ in outlines:
                shares.deal(work)
            sums, state, _ = _moved((sums, state, seen), _CPU)
            for source, (_, layers) in enumerate(outlines[: len(turn)]):
                parts = [shares.of(process, sums, state) for process in range(world)] if rank == source else None
                part = self.team.scattered(parts, source)
                yield _moved((*part, layers), self.problem.device)

    def _task(self, i: int, students: Mapping[str, Walk], experts: dict[str, Walk], worker: int, task: str) -> _Found:
        """A task's sums for a block, its expert's weights there, and the layers that were seen."""
        student, seen, block = students[task], {}, self.blocks[i]
        module = self.experts.apart(task) if len(self.students) > 1 else self.experts[task]
        path = experts.setdefault(task, self._walk(module, task, student.device))
        path.module = module
        with resident(submodule(module, block.path), student.device):
            state = _weights_of(module, submodule(student.module, block.path), block)
            return _moved((self._sums(i, student, path, state, seen, task), state, seen), self.problem.device)

    def _walk(self, module: nn.Module, task: str, device: torch.device) -> Walk:
        return Walk(module, self.problem.forward, self.plan, self.batches[task], self.store, device, self._up_to)

    def _up_to(self, module: nn.Module, i: int) -> AbstractContextManager[Any]:
        """Inside it, what runs before a block can run where the module lies."""
        rest = [submodule(module, block.path) for block in self.blocks[i:]]
        return resident(module, device_of(module), without=rest)

    def _device_of(self, student: nn.Module) -> torch.device:
        """The device on which a student's blocks run."""
        return self.problem.device if self.team.sharded else device_of(student)

    def _tokens(self, probe: Any) -> tuple[frozenset[Layer], float]:
        """The layers of the last block in which all tokens count, and the weight of the other tokens elsewhere."""
        last, settings = self.blocks[-1], self.settings
        if settings.other_tokens == 1 or not reads_first_token_only(self.student, self.problem.forward, last, probe):
            return frozenset(), 1.0
        full = full_layers(self.student, self.problem.forward, last, probe, settings.full)
        return full, settings.other_tokens

    def _sums(
        self, i: int, student: Walk, expert: Walk, state: Mapping[str, Tensor], seen: dict[Layer, None], task: str
    ) -> TaskSums:
        """The sums of one task over both paths; the expert's goes on to the next block."""
        last = i == len(self.blocks) - 1
        double = self.settings.ridge < _DOUBLE_BELOW or any(t.dtype == torch.float64 for t in state.values())
        sums = TaskSums(double=double, full=self.full if last else frozenset())
        for batch, inputs in enumerate(student.batches):
            theirs, output = _watched(expert, i, batch, outputs=True)
            if not last:
                expert.keep(i, batch, output)
            mine, output = _watched(student, i, batch, outputs=False)
            positions = self._positions(i, inputs, output)
            if positions.padded and (routed := next((layer for layer in mine if layer.routed), None)):
                line = f"'{routed.weight}' is a stack of experts: padding that is sent to them counts in their sums."
                self.warnings += [] if line in self.warnings else [line]
            seen.update(dict.fromkeys(mine))
            sums.add({layer: calls for layer, calls in mine.items() if layer.weight in state}, theirs, positions)
            if batch == len(student.batches) - 1:
                self._refuse_non_finite(sums, task, i)
        return sums

    def _positions(self, i: int, inputs: Any, output: Any) -> Positions:
        block, first = self.blocks[i], output[0] if isinstance(output, tuple) else output
        tokens = first.dim() == 3 and block.channel_axis in (-1, 2)
        sequence_first = tokens and block.batch_axis == 1
        length = first.shape[1 - block.batch_axis] if tokens else 1
        others = self.others if i == len(self.blocks) - 1 else 1.0
        return Positions.of(inputs, size(inputs), length=length, others=others, sequence_first=sequence_first)

    def _refuse_non_finite(self, sums: TaskSums, task: str, i: int) -> None:
        for layer, each in sums.grams.items():
            if not each.isfinite().all():
                raise DataError(
                    f"Task {task!r}: the inputs of '{layer.weight}' are not finite in block '{self.blocks[i].path}'. "
                    "Remedy: check the inputs and the merged weights, or run in float32."
                )

    def _solve(self, i: int, total: LayerSums, seen: Mapping[Layer, None]) -> None:
        part = submodule(self.student, self.blocks[i].path)
        anchors = self._anchors(i)
        own = self._own([layer for layer in seen if layer.kind != "batch_norm"], i, anchors)
        solved = self._solved(total, anchors, own)
        for layer in filter(solved.__contains__, own):
            weight, bias, warnings = solved[layer]
            self.warnings += warnings
            for tensor, name in ((weight, layer.weight), (bias, layer.bias)):
                if tensor is not None and name is not None:
                    refuse_overflow(name, tensor, tensor.to(self.student.get_parameter(name).dtype))
            if weight is not None:
                write_layer(layer, self.student, weight, bias)
        self.warnings += silent_layers(
            part, self.blocks[i].path, {a for layer in seen for a in self._aliases.get(layer.weight, ())}
        )

    def _solved(
        self, total: LayerSums, anchors: Mapping[str, Tensor], layers: Sequence[Layer]
    ) -> dict[Layer, Solution]:
        """The solutions of a block's layers, of which every process finds its share."""
        if self.team.world == 1:
            return total.solve(anchors, layers)
        solved: dict[Layer, Solution] = {}

        def own(rank: int) -> dict[Layer, Solution]:
            found = total.solve(anchors, layers)
            return {layer: each.to(_CPU) for layer, each in found.items()}

        for found in self.team.each(own, range(self.team.world)):
            solved |= found
        return solved

    def _anchors(self, i: int) -> dict[str, Tensor]:
        """Pretrained + anchor · (merged − pretrained), in float64, for a block's parameters that the base has."""
        prefix = f"{self.blocks[i].path}."
        anchors = {}
        for name, tensor in self.student.named_parameters():
            if not name.startswith(prefix):
                continue
            base = None if self.problem.base is None else self.problem.base.get(name)
            if self.problem.base is None:
                anchors[name] = tensor.double()
            elif base is not None:
                start = base.to(tensor.device, torch.float64)
                anchors[name] = start + self.settings.anchor[i] * (tensor.double() - start)
        return anchors

    def _own(self, layers: Iterable[Layer], i: int, anchors: Mapping[str, Tensor]) -> list[Layer]:
        """The layers that are to be solved: those whose tensors lie in this block alone, and that the base has."""
        prefix, own = f"{self.blocks[i].path}.", []
        for layer in layers:
            names = {
                alias: name for name in (layer.weight, layer.bias) if name for alias in self._aliases.get(name, ())
            }
            inside = [alias.startswith(prefix) for alias in names]
            if any(inside) and not all(inside):
                others = ", ".join(repr(alias) for alias in names if alias != names[alias])
                line = f"'{layer.weight}' is also used as {others}, in another block or none: left as merged."
                self.warnings += [] if line in self.warnings else [line]
            elif all(name in anchors for name in names.values()):
                own.append(layer)
        return own

    def _measure_batch_norms(
        self, i: int, students: Mapping[str, Walk], seen: Mapping[Layer, None], states: Mapping[str, Any]
    ) -> None:
        anchors = self._anchors(i)
        for layer in seen:
            if layer.kind == "batch_norm":
                calibrate_batch_norm(layer, i, students, states, anchors, self.settings.ridge)

    def _go_on(self, i: int, students: Mapping[str, Walk]) -> None:
        """Pass the block that is solved, on every device."""
        if i == len(self.blocks) - 1:
            return
        solved = submodule(self.student, self.blocks[i].path).state_dict()
        for student in self.students:
            if student is not self.student:
                submodule(student, self.blocks[i].path).load_state_dict(solved)

        def pass_on(worker: int, walk: Walk) -> None:
            for batch in range(len(walk.batches)):
                walk.keep(i, batch, walk.run(i, batch))

        own = list(students.values())[self.team.rank :: self.team.world]
        list(in_turn(len(self.students), pass_on, own))


def _student(problem: Problem) -> nn.Module:
    """The model to calibrate: a copy, or where weights are split over processes, one in a file that they map."""
    if not problem.team.sharded:
        return copy.deepcopy(problem.module).eval().requires_grad_(False)
    if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in problem.module.modules()):
        remedy = "Remedy: leave it out; such models fit one device."
        raise ConfigError(f"fabric.strategy=fsdp with BatchNorm: calibration measures it in one process. {remedy}")
    return hosted_copy(problem.module, problem.team, problem.cache)


def _moved(found: _Found, device: torch.device) -> _Found:
    sums, state, seen = found
    return sums.to(device), {name: tensor.to(device) for name, tensor in state.items()}, seen


def _copies(student: nn.Module, problem: Problem) -> list[nn.Module]:
    """The student alone, or a copy on each device of the problem, which share tasks out."""
    if len(problem.devices) < 2:
        return [student]
    return [copy.deepcopy(student).to(device) for device in problem.devices[: len(problem.tasks)]]


def _by_block(knob: str, anchor: float | Sequence[float], count: int) -> tuple[float, ...]:
    """The anchor of every block."""
    stops = [anchor] if isinstance(anchor, int | float) else list(anchor)
    if not stops:
        raise ConfigError(f"repair.{knob}=[]: wanted a number, or numbers from the first block to the last.")
    return tuple(value_between(stops, i / max(1, count - 1)) for i in range(count))


def _aliases(module: nn.Module) -> dict[str, list[str]]:
    """Name → all names of the same parameter."""
    by_tensor: dict[int, list[str]] = defaultdict(list)
    for name, tensor in module.named_parameters(remove_duplicate=False):
        by_tensor[id(tensor)].append(name)
    return {name: names for names in by_tensor.values() for name in names}


def _weights_of(expert: nn.Module, part: nn.Module, block: Block) -> dict[str, Tensor]:
    """The expert's tensors of a block, copied, by their names in the whole module."""
    state = expert.state_dict()
    names = [f"{block.path}.{name}" for name in part.state_dict()]
    return {name: state[name].clone() for name in names}


def _watched(walk: Walk, i: int, batch: int, *, outputs: bool) -> tuple[dict[Layer, list[Call]], Any]:
    """A block's layers in one pass, and its output. Only the results of the expert's layers are kept."""
    calls: dict[Layer, list[Call]] = defaultdict(list)

    def see(call: Call) -> None:
        if call.window is None:
            unused = {"input": call.input.new_empty(0).expand(*call.positions, 0)} if outputs else {"output": None}
            call = replace(call, **unused)
        calls[call.layer].append(call)

    output = walk.run(i, batch, LayerCalls(walk.module, see, with_norms=not outputs))
    return dict(calls), output
