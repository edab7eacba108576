"""One method, merging a model one tensor at a time, slice by slice and in bounded memory."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import Any, TypeVar

import torch
from torch import Tensor

from suture.errors import ConfigError, IncompatibleModels
from suture.merging.compiled import COMPILED, Slices
from suture.merging.compiled.methods import Merged
from suture.merging.methods.ties_merging import as_merged, settle
from suture.merging.registry import MergeMethod
from suture.merging.roles import MatrixOptions, Role
from suture.merging.streams import DeltaStream
from suture.merging.task_vectors import Piece, TaskVectors, Votes, matrix_memory, most_at_once, widened

T = TypeVar("T")
_IN_FLIGHT = 3  # tensors beyond one for each thread, of which small ones are soon done


@dataclass
class Merging:
    """One method, merging one tensor at a time, in any order.

    `knobs_of(name)` returns a tensor's validated knobs; `write(piece, merged)` stores merged entries, on any thread.
    `non_finite(name)` tells whether NaN and Inf are allowed in a tensor; a matrix that holds them takes the mean.
    `statistic` is what the method must know about the whole model: call `gather` first, or pass one that was gathered
    before. With `update` the difference to the base is written instead of the merged weights. `memory` bounds the bytes
    of the matrices that are merged at once, of which there is always one.
    """

    vectors: TaskVectors
    method: MergeMethod
    knobs_of: Callable[[str], Mapping[str, Any]]
    write: Callable[[Piece, Tensor], None]
    non_finite: Callable[[str], bool] = lambda name: False
    statistic: Any = None
    update: bool = False
    memory: float = inf

    def run(self) -> None:
        """Merge all tensors."""
        self.check()
        with self.vectors.workers():
            self.gather()
            all_votes = list(self.each(self.vectors.names, self.tensor))
            self.settle(sum(votes.count for votes in all_votes))
            for votes in all_votes:
                self.again(votes.waiting)

    def check(self) -> None:
        """Refuse a number of models that the method cannot merge, and options that fit no tensor (`ConfigError`)."""
        if problem := self.method.check_number(len(self.vectors.models)):
            raise ConfigError(problem)
        if not self.method.matrices:
            return
        for knobs in {repr(knobs): knobs for knobs in map(self.knobs_of, self.vectors.names)}.values():
            self.vectors.roles.check(MatrixOptions.of(knobs))
        for name in self.vectors.names:
            self.role(name)

    def each(self, names: Sequence[str], function: Callable[[str], T]) -> Iterator[T]:
        """`function` of every tensor, as it comes: matrices side by side, each on one thread; others on all threads."""
        matrices = sorted(filter(self._is_matrix, names), key=lambda name: (-self.vectors.specs[name].numel, name))
        yield from self.vectors.side_by_side(matrices, function, self.needs, self.memory)
        others = [name for name in names if not self._is_matrix(name)]
        searched = self.method.gather is not None and self.statistic is None
        yield from self.vectors.overlapping(others, function, 1 if searched else _IN_FLIGHT)

    def prepare(self) -> None:
        """Nothing: a method alone needs only `gather`; wrappers may need more (see `Wrapping`)."""

    @property
    def passes(self) -> int:
        """The number of passes that `prepare` takes."""
        return 0

    def whole_model(self) -> bool:
        """Whether the method must see the whole model before it merges a tensor."""
        names = self.vectors.names
        return bool(names) and self.method.gather is not None and self.knobs_of(names[0]).get("scope") == "model"

    def gather(self, stream: DeltaStream | None = None) -> None:
        """Gather the statistic of the whole model, if the method needs one and has none; read `stream` if given."""
        if self.statistic is None and self.whole_model():
            self.statistic = self._gathered(self.vectors.names, stream)

    def tensor(self, name: str) -> Votes:
        """Merge one tensor; returns its share of the votes that `settle` needs from the whole model."""
        if not self.vectors.specs[name].numel:
            return Votes()
        pieces = self.pieces(name)
        if self.method.matrices:
            (self._merge_matrices if self._is_matrix(name) else self._merge_vector)(pieces)
            return Votes()
        statistic = self.statistic
        if statistic is None and self.method.gather is not None:
            statistic = self._gathered([name])
        if self.method.vote is not None and statistic is not None and statistic.majority is None:
            return self._vote(pieces, statistic)
        self._merge(pieces, *(() if self.method.gather is None else (statistic,)))
        return Votes()

    def pieces(self, name: str) -> list[Piece]:
        """The slices of one tensor that are merged at once: whole matrices for a method on matrices."""
        if not self._is_matrix(name):
            return self.vectors.pieces(name, rows=self.method.whole_rows, on_device=True)
        role = self.role(name)
        size = role.rows * role.columns
        return [Piece(name, start, start + size) for start in range(0, role.count * size, size)]

    def needs(self, name: str) -> int:
        """The bytes that merging one of a tensor's matrices takes; 0 for a tensor that is merged in slices."""
        if not self._is_matrix(name):
            return 0
        dtype = self.vectors.base.specs[name].dtype
        return matrix_memory(self.method, len(self.vectors.models), self.role(name), dtype)

    def held(self) -> int:
        """The most bytes that matrices take at once."""
        return most_at_once(map(self.needs, self.vectors.names), self.vectors.number_of_threads, self.memory)

    def settle(self, votes: int) -> None:
        """Complete the statistic with the votes of all tensors."""
        if self.method.vote is not None and self.statistic is not None:
            self.statistic = settle(self.statistic, votes)

    def again(self, waiting: Sequence[Piece]) -> bool:
        """Merge the slices that waited for `settle` again; returns whether that changed anything."""
        if not waiting or as_merged(self.statistic):
            return False
        self._merge(waiting, self.statistic)
        return True

    def _gathered(self, names: Sequence[str], stream: DeltaStream | None = None) -> Any:
        assert self.method.gather is not None
        stream = stream or self.vectors.stream(names, self.method.operand, rows=self.method.whole_rows)
        return self.method.gather(stream, **self.knobs_of(names[0]))

    def role(self, name: str) -> Role:
        """The role of a tensor, for a method on whole matrices."""
        return self.vectors.roles.of(name, MatrixOptions.of(self.knobs_of(name)))

    def _is_matrix(self, name: str) -> bool:
        return self.method.matrices and name in self._merged_names and self.role(name).kind != "vector"

    @cached_property
    def _merged_names(self) -> set[str]:
        return set(self.vectors.names)

    def _merge(self, pieces: Sequence[Piece], *statistic: Any) -> None:
        method, name = self.method, pieces[0].name
        knobs, width = self.knobs_of(name), self.vectors.row_width(name)
        compiled = self._compiled(name, statistic[0] if statistic else None)

        def merge_piece(piece: Piece, stored: Tensor, models: Sequence[Tensor]) -> None:
            if (found := compiled(piece, stored, models)) is not None:
                return self.write(piece, found.merged)
            base, rows = widened(stored, models, method.operand, self.vectors.device)
            self._check(piece, base, rows)
            position = {"position": self.vectors.position(piece)} if method.takes_position else {}
            if method.whole_rows:
                base, rows = base.view(-1, width), rows.view(len(rows), -1, width)
            origin = self._origin(base)
            merged = method.function(origin, rows, *statistic, **position, **knobs)
            self.write(piece, self._as_update(merged, base).reshape(-1))

        self.vectors.each_stored(pieces, merge_piece)

    def _compiled(self, name: str, statistic: Any) -> Callable[[Piece, Tensor, Sequence[Tensor]], Merged | None]:
        """The compiled loop of the method for slices of a tensor; it returns None where the plain path has to do it."""
        loop, module = COMPILED.get(self.method.name), self.vectors.loops
        if self.update or module is None or loop is None:
            return lambda piece, base, models: None
        knobs = {**self.method.knobs.defaults, **self.knobs_of(name)}

        def merge_piece(piece: Piece, base: Tensor, models: Sequence[Tensor]) -> Merged | None:
            slices = Slices.of(base, models)
            return slices and loop(module, slices, statistic, self.vectors.position(piece), knobs)

        return merge_piece

    def _origin(self, base: Tensor) -> Tensor:
        """The tensor that task vectors are added to: zeros where only the update is wanted."""
        return torch.zeros_like(base) if self.update and self.method.operand == "deltas" else base

    def _as_update(self, merged: Tensor, base: Tensor) -> Tensor:
        return merged - base if self.update and self.method.operand == "models" else merged

    def _merge_vector(self, pieces: Sequence[Piece]) -> None:
        """Merge a tensor that is no matrix, for a method on matrices."""
        options = MatrixOptions.of(self.knobs_of(pieces[0].name))

        def merge_piece(piece: Piece, base: Tensor, deltas: Tensor) -> None:
            self._check(piece, base, deltas)
            mean = deltas.mean(0) if options.vectors == "mean" else torch.zeros_like(base)
            self.write(piece, self._origin(base) + options.alpha * mean)

        self.vectors.each_of(pieces, merge_piece, device=self.vectors.device)

    def _merge_matrices(self, pieces: Sequence[Piece]) -> None:
        """Merge a tensor's matrices one by one, on this thread."""
        name = pieces[0].name
        role, knobs = self.role(name), self.knobs_of(name)
        own = self.method.knobs.own(knobs)
        for piece in pieces:
            base, deltas = self.vectors.read(piece, device=self.vectors.device)
            self._check(piece, base, deltas)
            if self.non_finite(name) and not deltas.isfinite().all():
                update = deltas.mean(0)
            else:
                blocks = role.blocks(role.matrices(deltas))
                update = role.joined([self.method.function(block, **own) for block in blocks]).to(base.dtype)
            self.write(piece, self._origin(base) + knobs["alpha"] * update)

    def _vote(self, pieces: Sequence[Piece], statistic: Any) -> Votes:
        """Merge and count votes in one pass; returns the votes and the slices that have to wait for the total."""
        knobs, lock = self.knobs_of(pieces[0].name), threading.Lock()
        counts: list[int] = []
        waiting: list[Piece] = []
        merge_and_vote = self.method.vote
        assert merge_and_vote is not None
        compiled = self._compiled(pieces[0].name, statistic)

        def plainly(piece: Piece, stored: Tensor, models: Sequence[Tensor]) -> Merged:
            base, deltas = widened(stored, models, device=self.vectors.device)
            self._check(piece, base, deltas)
            merged, votes, cancelled = merge_and_vote(self._origin(base), deltas, statistic, **knobs)
            return Merged(merged, votes, cancelled is not None)

        def merge_piece(piece: Piece, stored: Tensor, models: Sequence[Tensor]) -> None:
            found = compiled(piece, stored, models) or plainly(piece, stored, models)
            self.write(piece, found.merged)
            with lock:
                counts.append(found.votes)
                if found.cancelled:
                    waiting.append(piece)

        self.vectors.each_stored(pieces, merge_piece)
        return Votes(sum(counts), sorted(waiting))

    def _check(self, piece: Piece, base: Tensor, rows: Tensor) -> None:
        if not self.non_finite(piece.name):
            refuse_non_finite(self.vectors, piece, base, rows)


def refuse_non_finite(vectors: TaskVectors, piece: Piece, base: Tensor, rows: Tensor) -> None:
    """Raise `IncompatibleModels` if the base or a model holds NaN or Inf in a slice."""
    if (rows.sum() + base.sum()).isfinite():  # cheap; only a sum that overflowed or met NaN or Inf needs the search
        return
    for label, row in [*zip(vectors.models, rows, strict=True), ("_pretrained_", base)]:
        if not row.isfinite().all():
            entry = int((~row.isfinite()).nonzero()[0]) + piece.start
            raise IncompatibleModels(
                f"'{piece.name}' is not finite at entry {entry} in '{label}' or in the base. "
                "Remedy: export that checkpoint again; NaN and Inf cannot be merged."
            )
