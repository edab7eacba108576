"""Wrappers around any merge: the method's update of a tensor, changed before it is added to the base.

A wrapper is one function. On whole matrices it takes the update (out, in) and the task vectors (task, out, in) of one
matrix, and other tensors stay as merged. Else it takes the entries of an update, the `depth` of its block from 0 to 1,
and the `ratio` ‖ΣΔ‖₁/‖M‖₁/T of the whole model. Keyword-only arguments are its knobs.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from suture.checkpoints import TensorSpec
from suture.core.discovery import import_all
from suture.core.knobs import Knobs
from suture.errors import ConfigError, unknown_name
from suture.merging.blocks import block_depths
from suture.merging.roles import Role, RoleOptions, Roles
from suture.merging.task_vectors import Piece, Votes, compute_dtype, most_at_once

if TYPE_CHECKING:
    from suture.merging.registry import MergeMethod
    from suture.merging.streams import DeltaStream
    from suture.merging.task_vectors import TaskVectors
    from suture.merging.tensorwise import Merging

_WRAPPERS: dict[str, "Wrapper"] = {}
F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
After = Sequence[Any] | Mapping[Any, Any] | str | None
_WORKSPACE = 8  # float64 matrices that a wrapper on matrices holds: the update, its SVD, a task vector, products


@dataclass(frozen=True)
class Wrapper:
    """One registered wrapper; `unscaled`: it takes the method's update at scale 1."""

    name: str
    function: Callable[..., Any]
    paper: str
    matrices: bool = False
    unscaled: bool = False

    @cached_property
    def knobs(self) -> Knobs:
        """The function's knobs; where it takes matrices, also those that say which tensors are some."""
        return Knobs(self.name, self.function, self.name, RoleOptions if self.matrices else None)


class Wrapped(NamedTuple):
    """A wrapper with its knobs set."""

    wrapper: Wrapper
    knobs: Mapping[str, Any]


def merge_wrapper(*, paper: str, **properties: Any) -> Callable[[F], F]:
    """Register the decorated function as a wrapper under its own name; `properties` are those of `Wrapper`."""

    def register(function: F) -> F:
        _WRAPPERS[function.__name__] = Wrapper(function.__name__, function, paper, **properties)
        return function

    return register


def wrappers() -> dict[str, Wrapper]:
    """All registered wrappers by name, sorted: those of `suture.merging.wrappers` and your own."""
    _find()
    return dict(sorted(_WRAPPERS.items()))


def chosen_wrappers(after: Any) -> list[Wrapped]:
    """Wrappers in their order, from names, or name → knobs; raises `ConfigError` for what does not fit."""
    names = [after] if isinstance(after, str) else after or ()
    if not isinstance(names, Sequence | Mapping):
        raise ConfigError(
            f"method.after={after!r}: wanted names of wrappers, such as [svc], or {{svc: {{alpha: 0.2}}}}."
        )
    known, chosen = wrappers(), []
    for name in names:
        if not isinstance(name, str) or name not in known:
            raise ConfigError(unknown_name("wrapper", str(name), known))
        values = names[name] if isinstance(names, Mapping) else None
        if not isinstance(values or {}, Mapping):
            raise ConfigError(
                f"method.after.{name}={values!r} is no mapping. Remedy: give its knobs, as {{alpha: 0.2}}."
            )
        chosen.append(Wrapped(known[name], known[name].knobs.validate(values or {})))
    return chosen


def wrapper_problems(after: Sequence[Wrapped], specs: Mapping[str, TensorSpec]) -> list[str]:
    """One line for each wrapper whose patterns of names fit no tensor."""
    problems = []
    for wrapper, knobs in after:
        try:
            Roles(specs).check(RoleOptions.of(knobs) if wrapper.matrices else RoleOptions())
        except ConfigError as error:
            problems.append(str(error))
    return problems


@cache
def _find() -> None:
    import_all("suture.merging.wrappers")


@dataclass
class Wrapping:
    """A merge whose updates go through wrappers; `inner` is the method alone, with `update`, and `Merging`'s interface.

    A tensor that a wrapper takes matrices of is held whole by its thread, with the task vectors of one matrix; others
    go through slice by slice. Methods that vote over the whole model, and wrappers that need the `ratio`, take one more
    pass each, in `prepare`.
    """

    inner: "Merging"
    after: Sequence[Wrapped]
    write: Callable[[Piece, Tensor], None]
    _sinks: dict[str, Callable[[Piece, Tensor], None]] = field(default_factory=dict)
    _ratio: float = 1.0

    def __post_init__(self):
        scale, knobs_of = self.inner.method.scale, self.inner.knobs_of
        if any(wrapper.unscaled for wrapper, _ in self.after) and scale is not None:
            self.inner.knobs_of = lambda name: {**knobs_of(name), scale: 1.0}
        self.inner.write, self.inner.update = self._pass_on, True

    @property
    def vectors(self) -> "TaskVectors":
        """As `Merging.vectors`."""
        return self.inner.vectors

    @property
    def method(self) -> "MergeMethod":
        """As `Merging.method`."""
        return self.inner.method

    @property
    def memory(self) -> float:
        """As `Merging.memory`."""
        return self.inner.memory

    @property
    def statistic(self) -> Any:
        """As `Merging.statistic`."""
        return self.inner.statistic

    @statistic.setter
    def statistic(self, value: Any) -> None:
        self.inner.statistic = value

    def run(self) -> None:
        """Merge all tensors."""
        self.check()
        with self.inner.vectors.workers():
            self.inner.gather()
            self.prepare()
            deque(self.each(self.inner.vectors.names, self.tensor), maxlen=0)

    def check(self) -> None:
        """As `Merging.check`, and refuse patterns of wrappers that fit no tensor (`ConfigError`)."""
        self.inner.check()
        if problems := wrapper_problems(self.after, self.inner.vectors.base.specs):
            raise ConfigError(problems[0])

    def whole_model(self) -> bool:
        """As `Merging.whole_model`."""
        return self.inner.whole_model()

    def gather(self, stream: "DeltaStream | None" = None) -> None:
        """As `Merging.gather`."""
        self.inner.gather(stream)

    def settle(self, votes: int) -> None:
        """Nothing: votes are counted in `prepare`."""

    def prepare(self) -> None:
        """Count the votes of the whole model, so that no tensor is merged twice, and take the `ratio`."""
        names = self.inner.vectors.names
        statistic = self.inner.statistic if self.inner.method.vote is not None else None
        if statistic is not None and statistic.majority is None:
            self.inner.settle(sum(self.inner.each(names, lambda name: self._into(name, _drop))))
        if not all(wrapper.matrices for wrapper, _ in self.after):
            self._ratio = self._l1_ratio()

    @property
    def passes(self) -> int:
        """The number of passes that `prepare` takes."""
        votes = self.inner.method.vote is not None and self.inner.whole_model()
        return votes + (not all(wrapper.matrices for wrapper, _ in self.after))

    def each(self, names: Sequence[str], function: Callable[[str], T]) -> Iterator[T]:
        """`function` of every tensor, as it comes: those that are held side by side, each on one thread."""
        specs = self.inner.vectors.specs
        held = sorted(filter(self._is_held, names), key=lambda name: (-specs[name].numel, name))
        yield from self.inner.vectors.side_by_side(held, function, self.needs, self.inner.memory)
        yield from self.inner.each([name for name in names if not self._is_held(name)], function)

    def tensor(self, name: str) -> Votes:
        """Merge one tensor; nothing waits for votes, which are counted before."""
        if not self._is_held(name):
            depth = self._depth(name)
            self._into(name, lambda piece, part: self._write(piece, self._scaled(part, depth)))
        elif self.inner.vectors.specs[name].numel:
            self._write_held(name)
        return Votes()

    def pieces(self, name: str) -> list[Piece]:
        """The slices of one tensor that are written at once."""
        return self.inner.vectors.pieces(name) if self._is_held(name) else self.inner.pieces(name)

    def again(self, waiting: Sequence[Piece]) -> bool:
        """Nothing waits: see `tensor`."""
        return False

    def needs(self, name: str) -> int:
        """The bytes that merging one tensor takes: a held one whole, and one of its matrices with its task vectors."""
        if not self._is_held(name):
            return self.inner.needs(name)
        spec, tasks = self.inner.vectors.specs[name], len(self.inner.vectors.models)
        itemsize, role = compute_dtype(spec.dtype).itemsize, self.role(name)
        matrix = role.rows * role.columns * ((2 * tasks + 3) * itemsize + 8 * _WORKSPACE)
        return self.inner.needs(name) + spec.numel * itemsize + matrix

    def held(self) -> int:
        """The most bytes that matrices take at once."""
        vectors = self.inner.vectors
        return most_at_once(map(self.needs, vectors.names), vectors.number_of_threads, self.inner.memory)

    def role(self, name: str) -> Role:
        """A tensor's role for the first wrapper that takes matrices, or else for the method."""
        taken = [knobs for wrapper, knobs in self.after if wrapper.matrices]
        return self._role(name, taken[0]) if taken else self.inner.role(name)

    def _is_held(self, name: str) -> bool:
        if name not in self._merged_names:
            return False
        taken = [knobs for wrapper, knobs in self.after if wrapper.matrices]
        return any(self._role(name, knobs).kind != "vector" for knobs in taken)

    @cached_property
    def _merged_names(self) -> set[str]:
        return set(self.inner.vectors.names)

    def _into(self, name: str, sink: Callable[[Piece, Tensor], None]) -> int:
        """Give the parts of the method's update of one tensor to `sink`, on any thread; returns its votes."""
        self._sinks[name] = sink
        votes = self.inner.tensor(name).count
        del self._sinks[name]
        return votes

    def _pass_on(self, piece: Piece, part: Tensor) -> None:
        self._sinks[piece.name](piece, part)

    def _write(self, piece: Piece, update: Tensor) -> None:
        base, _ = self.inner.vectors.flat(piece.name)
        self.write(piece, base[piece.start : piece.stop].to(update.device, update.dtype) + update)

    def _scaled(self, part: Tensor, depth: float) -> Tensor:
        """Part of an update that is no matrix, after all wrappers."""
        for wrapper, knobs in self.after:
            part = part if wrapper.matrices else wrapper.function(part, depth, self._ratio, **knobs)
        return part

    def _l1_ratio(self) -> float:
        """‖ΣΔ‖₁/‖M‖₁/T over the whole model; 1/T where nothing was merged."""
        sums = sorted(self.inner.each(self.inner.vectors.names, self._l1_norms))
        total, merged = (math.fsum(column) for column in zip(*sums, strict=True)) if sums else (0.0, 0.0)
        return (total / merged if merged else 1.0) / len(self.inner.vectors.models)

    def _l1_norms(self, name: str) -> tuple[float, float]:
        merged, total, vectors = [], [], self.inner.vectors
        self._into(name, lambda piece, part: merged.append(float(part.abs().sum(dtype=torch.float64))))

        def add(piece: Piece, base: Tensor, deltas: Tensor) -> None:
            total.append(float(deltas.sum(0, dtype=torch.float64).abs().sum()))

        vectors.each_of(vectors.pieces(name), add, device=vectors.device)
        return math.fsum(total), math.fsum(merged)

    def _write_held(self, name: str) -> None:
        spec = self.inner.vectors.specs[name]
        update = torch.empty(spec.numel, dtype=compute_dtype(spec.dtype))

        def collect(piece: Piece, part: Tensor) -> None:
            update[piece.start : piece.stop] = part

        self._into(name, collect)
        for wrapper, knobs in self.after:
            update = self._wrapped(wrapper, knobs, name, update)
        for piece in self.inner.vectors.pieces(name):
            self._write(piece, update[piece.start : piece.stop])

    def _wrapped(self, wrapper: Wrapper, knobs: Mapping[str, Any], name: str, update: Tensor) -> Tensor:
        """The update of a tensor after one wrapper, written over it where that takes matrices."""
        if not wrapper.matrices:
            return wrapper.function(update, self._depth(name), self._ratio, **knobs)
        role, own = self._role(name, knobs), wrapper.knobs.own(knobs)
        size = role.rows * role.columns
        for start in range(0, role.count * size, size or 1):
            _, deltas = self.inner.vectors.read(Piece(name, start, start + size))
            matrices = role.matrices(torch.cat([update[None, start : start + size], deltas]))
            blocks = [wrapper.function(block[0], block[1:], **own) for block in role.blocks(matrices)]
            update[start : start + size] = role.joined(blocks)
        return update

    def _role(self, name: str, knobs: Mapping[str, Any]) -> Role:
        """A tensor's role, as the method's knobs or the wrapper's own say."""
        options, method = RoleOptions.of(knobs), self.inner.method
        given = RoleOptions.of(self.inner.knobs_of(name)) if method.matrices and options == RoleOptions() else options
        return self.inner.vectors.roles.of(name, given)

    @cached_property
    def _depth(self) -> Callable[[str], float]:
        return block_depths(self.inner.vectors.names)


def _drop(piece: Piece, part: Tensor) -> None:
    """A part that only counts votes."""
