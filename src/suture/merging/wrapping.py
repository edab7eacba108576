"""Wrappers around any merge: the method's update of a tensor, changed before it is added to the base.

A wrapper is one function. On whole matrices it takes the update (out, in) and the task vectors (task, out, in) of one
matrix, and other tensors stay as merged. Else it takes the entries of an update, the `depth` of its block from 0 to 1,
and the `ratio` ‖ΣΔ‖₁/‖M‖₁/T of the whole model. Keyword-only arguments are its knobs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
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
from suture.merging.task_vectors import Piece, compute_dtype

if TYPE_CHECKING:
    from suture.merging.merge import Merging

_WRAPPERS: dict[str, "Wrapper"] = {}
F = TypeVar("F", bound=Callable[..., Any])
After = Sequence[Any] | Mapping[Any, Any] | str | None


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
    """A merge whose updates go through wrappers, one tensor at a time; `inner` is the method alone, with `update`.

    One tensor of every thread is held, with the task vectors of one of its matrices. Methods that vote over the whole
    model, and wrappers that need the `ratio`, take one more pass each.
    """

    inner: "Merging"
    after: Sequence[Wrapped]
    write: Callable[[Piece, Tensor], None]
    _updates: dict[str, Tensor] = field(default_factory=dict)
    _ratio: float = 1.0

    def __post_init__(self):
        scale, knobs_of = self.inner.method.scale, self.inner.knobs_of
        if any(wrapper.unscaled for wrapper, _ in self.after) and scale is not None:
            self.inner.knobs_of = lambda name: {**knobs_of(name), scale: 1.0}
        self.inner.write, self.inner.update = self._collect, True

    def run(self) -> None:
        """Merge all tensors."""
        self.inner.check()
        if problems := wrapper_problems(self.after, self.inner.vectors.base.specs):
            raise ConfigError(problems[0])
        with self.inner.vectors.workers():
            self.inner.gather()
            self._settle()
            if not all(wrapper.matrices for wrapper, _ in self.after):
                self._ratio = self._l1_ratio()
            self._each(self._write_one)

    def _each(self, function: Callable[[str], Any]) -> list[Any]:
        """`function` of every tensor, side by side, each on one thread."""
        vectors = self.inner.vectors
        names = sorted(vectors.names, key=lambda name: (-vectors.specs[name].numel, name))
        return list(vectors.side_by_side(names, function, lambda name: 0, math.inf))

    def _settle(self) -> None:
        """Count the votes of the whole model, so that no tensor has to be merged again."""
        if self.inner.method.vote is not None and self.inner.statistic is not None:
            self.inner.settle(sum(self._each(lambda name: self._merged(name)[1])))

    def _merged(self, name: str) -> tuple[Tensor, int]:
        """The method's update of one tensor, flat, and its votes."""
        spec = self.inner.vectors.specs[name]
        self._updates[name] = torch.empty(spec.numel, dtype=compute_dtype(spec.dtype))
        votes = self.inner.tensor(name)
        return self._updates.pop(name), votes.count

    def _collect(self, piece: Piece, part: Tensor) -> None:
        self._updates[piece.name][piece.start : piece.stop] = part

    def _l1_ratio(self) -> float:
        """‖ΣΔ‖₁/‖M‖₁/T over the whole model; 1/T where nothing was merged."""
        sums = sorted(self._each(self._l1_norms))
        total, merged = (math.fsum(column) for column in zip(*sums, strict=True)) if sums else (0.0, 0.0)
        return (total / merged if merged else 1.0) / len(self.inner.vectors.models)

    def _l1_norms(self, name: str) -> tuple[float, float]:
        update, vectors = self._merged(name)[0], self.inner.vectors
        sums = [vectors.read(piece)[1].sum(0, dtype=torch.float64).abs().sum() for piece in vectors.pieces(name)]
        return math.fsum(map(float, sums)), float(update.abs().sum(dtype=torch.float64))

    def _write_one(self, name: str) -> None:
        update, _ = self._merged(name)
        for wrapper, knobs in self.after:
            update = self._wrapped(wrapper, knobs, name, update)
        base, _ = self.inner.vectors.flat(name)
        for piece in self.inner.vectors.pieces(name):
            part = base[piece.start : piece.stop].to(update.dtype)
            self.write(piece, part + update[piece.start : piece.stop])

    def _wrapped(self, wrapper: Wrapper, knobs: Mapping[str, Any], name: str, update: Tensor) -> Tensor:
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
