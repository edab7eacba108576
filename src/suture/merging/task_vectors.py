"""The models of one merge side by side, and their task vectors as a stream of slices."""

import math
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, reduce
from itertools import chain, groupby
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from suture.checkpoints import Checkpoint, Parts, Source, TensorSpec
from suture.errors import ConfigError, IncompatibleModels, shown
from suture.merging.compatibility import compatibility, merged_names, open_models
from suture.merging.compiled.loading import compiled_loops, worth_it
from suture.merging.compiled.slices import Slices
from suture.merging.counter_random import SlicePosition, draw_names
from suture.merging.order_statistic import kth_memory
from suture.merging.registry import MergeMethod
from suture.merging.roles import Role, Roles
from suture.merging.selection import Selection, select
from suture.merging.streams import BLOCK, CompiledTally, Tally

_CHUNK = 1 << 17  # entries of one model handled at once: the chunks of all models together fit in the cache
_DEVICE_CHUNK = 1 << 23  # on a device, calls cost more than a cache saves: a quarter of a gigabyte for eight models
_DEVICE_THREADS = 4  # that hand slices to a device: one is read while others are copied and merged
_BYTES_HERE = 16  # for each entry that is merged on a device: the result, in two dtypes, and what it is written from
_SHORT_CHUNK = 1 << 14  # below this, giving up a thread costs less than the calls for shorter slices
_GRAIN = BLOCK
_LARGE_BLOCK = 30 << 20  # bytes; glibc adapts its threshold to freed blocks of up to 32 MB
FIXED_BYTES = 8_000_000  # for Python, threads and manifests
_THREAD = threading.local()
T = TypeVar("T")
Flat = Tensor | Parts
Work = Callable[["Piece", Tensor, Tensor], None]
Stored = Callable[["Piece", Tensor, Sequence[Tensor]], None]


class Piece(NamedTuple):
    """A slice of one flattened tensor: entries start … stop of the tensor `name`."""

    name: str
    start: int
    stop: int


class Votes(NamedTuple):
    """Σ of the signs of one tensor's columns, and the slices that wait for the sign of this sum over all tensors."""

    count: int = 0
    waiting: Sequence[Piece] = ()


@dataclass(frozen=True)
class TaskVectors:
    """A base and its fine-tuned models, opened; tensors are read when needed.

    Tensors named in `frozen` stay at the base. Of tied names only the first is merged. Integer and bool tensors always
    come from the base. Arithmetic is in float32, or float64 for float64 tensors. `chunk` entries of each model are
    handled at once; with 0, as many as fit in the cache. Slices are merged on `device`, `device_chunk` entries at once.
    Order statistics are searched for there too; other statistics, and matrices, are those of the CPU. `module` is the
    base itself, where it was given as a module.
    """

    base: Checkpoint
    models: Mapping[str, Checkpoint]
    frozen: Sequence[str] = ()
    threads: int = 0
    chunk: int = 0
    device: str = "cpu"
    module: nn.Module | None = None
    device_chunk: int = 0
    _pools: list[ThreadPoolExecutor] = field(default_factory=list, repr=False, compare=False)

    @cached_property
    def names(self) -> list[str]:
        """Names of the tensors that are merged, sorted."""
        return merged_names(self.base, self.frozen)

    @cached_property
    def unchanged(self) -> list[str]:
        """Names of the tensors that are copied from the base, sorted; tied names are in neither list."""
        return sorted(set(self.base.specs) - set(self.names) - set(self.base.aliases))

    @cached_property
    def roles(self) -> Roles:
        """The role of each tensor, for methods on whole matrices."""
        return Roles(self.base.specs, self.module)

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Name → shape and dtype of every tensor of the result, without tied names: those of the base."""
        return {name: self.base.specs[name] for name in sorted([*self.names, *self.unchanged])}

    def stream(self, names: Sequence[str] | None = None, operand: str = "deltas", *, rows: bool = False) -> "RowStream":
        """The task vectors (or the models' own weights) of some tensors, by default all, as a stream of flat chunks."""
        return RowStream(self, self.names if names is None else names, operand, rows=rows)

    def each_piece(self, names: Sequence[str], function: Work, operand: str = "deltas", *, rows: bool = False) -> None:
        """Call `function(piece, base, rows)` on every slice, on several threads, in no particular order.

        base: (chunk,); rows: (task, chunk), the task vectors, or the models' own weights if `operand` is "models". With
        `rows` slices are whole rows of a matrix, whose first axis is the tensor's.
        """
        pieces = chain.from_iterable(self.pieces(name, rows=rows) for name in names)
        self.each_of(pieces, function, operand)

    def each_of(self, pieces: Iterable[Piece], function: Work, operand: str = "deltas", *, device: str = "cpu") -> None:
        """As `each_piece`, for some pieces, with base and rows on a device."""
        self.each_stored(pieces, lambda piece, base, models: function(piece, *widened(base, models, operand, device)))

    def each_stored(self, pieces: Iterable[Piece], function: Stored) -> None:
        """Call `function(piece, base, models)` on every piece, on several threads, in no particular order.

        base: (entries,) and models: (entries,) of each, in the dtypes in which they are stored. The threads take the
        pieces of all tensors from one queue, so that none waits at the end of a tensor.
        """
        pieces = pieces if isinstance(pieces, Sequence) else iter(pieces)
        waiting, lock = self._opened(pieces), threading.Lock()

        def work(_: int) -> None:
            while True:
                with lock:
                    found = next(waiting, None)
                if found is None:
                    return
                piece, base, models = found
                part = slice(piece.start, piece.stop)
                with _own_stream(self.device):
                    function(piece, base[part], [model[part] for model in models])

        if getattr(_THREAD, "is_worker", False):  # which waits for no other
            return work(0)
        threads = self.number_of_threads
        with self.workers() as pool:
            for _ in pool.map(work, range(min(threads, len(pieces)) if isinstance(pieces, Sequence) else threads)):
                pass

    def _opened(self, pieces: Iterable[Piece]) -> Iterator[tuple[Piece, Flat, list[Flat]]]:
        """Each piece with its tensor of the base and of every model, which are opened once for neighbouring pieces."""
        for name, group in groupby(pieces, key=lambda piece: piece.name):
            base, models = self.flat(name)
            for piece in group:
                yield piece, base, models

    @cached_property
    def loops(self) -> Any:
        """The compiled loops, if they are installed and the models are large enough; else None."""
        entries = sum(self.base.specs[name].numel for name in self.names) * len(self.models)
        return compiled_loops() if self.device == "cpu" and worth_it(entries) else None

    def side_by_side(
        self, items: Sequence[str], function: Callable[[str], T], needs: Callable[[str], int], memory: float
    ) -> Iterator[T]:
        """`function` of every item, each on one thread; side by side where `memory` has room for one on every thread.

        `needs(item)` are the bytes that one takes. Larger ones run first, one after another and all on one thread,
        because a thread keeps the memory that it has freed for itself.
        """
        room = memory / self.number_of_threads
        large = [item for item in items if needs(item) > room]
        with self.workers() as pool:
            if large:
                with ThreadPoolExecutor(1, initializer=_begin_worker) as one:
                    yield from one.map(function, large)
            yield from pool.map(function, [item for item in items if needs(item) <= room])

    def overlapping(self, items: Sequence[str], function: Callable[[str], T], more: int) -> Iterator[T]:
        """`function` of every item, in order; with `more` than one, the next ones begin before one is done.

        The pieces of all that have begun are in one queue, so no thread waits at the end of an item.
        """
        if more == 1 or len(items) < 2 or self.number_of_threads == 1:
            yield from map(function, items)
            return
        with self.workers(), ThreadPoolExecutor(self.number_of_threads + more) as coordinators:
            yield from coordinators.map(function, items)

    @contextmanager
    def workers(self) -> Iterator[ThreadPoolExecutor]:
        """A pool of threads that run torch on one core each; inside the block every pass uses it."""
        if self._pools:
            yield self._pools[-1]
            return
        _keep_freed_buffers()
        intra_op = torch.get_num_threads()
        try:
            with ThreadPoolExecutor(self.number_of_threads, initializer=_begin_worker) as pool:
                self._pools.append(pool)
                yield pool
        finally:
            self._pools.clear()
            torch.set_num_threads(intra_op)

    @property
    def number_of_threads(self) -> int:
        """The number of threads that handle pieces."""
        threads = self.threads or torch.get_num_threads()
        return threads if self.device == "cpu" else min(threads, _DEVICE_THREADS)

    def flat(self, name: str) -> tuple[Flat, list[Flat]]:
        """One tensor of the base and of every model, each flattened for slicing."""
        return self.base.flat(name), [model.flat(name) for model in self.models.values()]

    @cached_property
    def _draw_names(self) -> dict[str, str]:
        base = self.base
        floating = [n for n, spec in base.specs.items() if spec.dtype.is_floating_point and n not in base.aliases]
        return draw_names(floating, base.aliases)

    def read(self, piece: Piece, operand: str = "deltas", *, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """Base (entries,) and rows (task, entries) of one piece."""
        base, models = self.flat(piece.name)
        part = slice(piece.start, piece.stop)
        return widened(base[part], [model[part] for model in models], operand, device)

    def position(self, piece: Piece) -> SlicePosition:
        """The position that determines the random numbers of a slice."""
        return SlicePosition(self._draw_names[piece.name], list(self.models), piece.start)

    def row_width(self, name: str) -> int:
        """Entries per row of a tensor seen as a matrix whose rows are its first axis; a vector is one row."""
        shape = self.base.specs[name].shape
        return math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)

    def pieces(self, name: str, *, rows: bool = False, on_device: bool = False) -> list[Piece]:
        """The slices of one tensor; with `rows` they are whole rows of a matrix, and with `on_device` long ones."""
        numel, unit = self.base.specs[name].numel, self.row_width(name) if rows else 1
        there = on_device and self.device != "cpu"
        chunk = (self.device_chunk or _DEVICE_CHUNK) if there else (self.chunk or _CHUNK)
        length = max(1, chunk // max(1, unit)) * unit
        return [Piece(name, start, min(start + length, numel)) for start in range(0, numel, length or 1)]


class RowStream:
    """The `DeltaStream` of several tensors: one long row per task, read in chunks.

    With `rows` the chunks of `each_with_position` are whole rows of matrices: (task, row, column).
    """

    def __init__(self, vectors: TaskVectors, names: Sequence[str], operand: str = "deltas", *, rows: bool = False):
        self.vectors, self.names = vectors, names
        self.operand, self.rows = operand, rows
        self.num_entries = sum(vectors.base.specs[name].numel for name in names)

    def each(self, function: Callable[[Float[Tensor, " chunk"], Float[Tensor, "task chunk"]], None]) -> None:
        """Call `function(base, rows)` on every chunk, on several threads, in no particular order."""
        self.vectors.each_piece(self.names, lambda piece, base, rows: function(base, rows), self.operand)

    def each_with_position(self, function: Callable[[SlicePosition, Float[Tensor, "task chunk"]], None]) -> None:
        """Call `function(position, rows)` on every chunk, as `each` does."""

        def work(piece: Piece, base: Tensor, rows: Tensor) -> None:
            shaped = rows.view(len(rows), -1, self.vectors.row_width(piece.name)) if self.rows else rows
            function(self.vectors.position(piece), shaped)

        self.vectors.each_piece(self.names, work, self.operand, rows=self.rows)

    def tally(self, function: Tally, totals: Sequence[np.ndarray]) -> None:
        """As `each`, for a function that only adds to `totals`: integer arrays that are zero before the call."""
        if self.vectors.device != "cpu" and isinstance(function, CompiledTally):
            pieces = chain.from_iterable(self.vectors.pieces(name, on_device=True) for name in self.names)
            count = lambda piece, base, rows: function.count_on_device(rows)
            return self.vectors.each_of(pieces, count, self.operand, device=self.vectors.device)
        if self.vectors.loops is None or not isinstance(function, CompiledTally):
            return self.each(function)

        def work(piece: Piece, base: Tensor, models: Sequence[Tensor]) -> None:
            slices = Slices.of(base, models)
            if slices is None or not function.count(self.vectors.loops, slices, self.operand == "deltas"):
                function(*widened(base, models, self.operand))

        self.vectors.each_stored(chain.from_iterable(map(self.vectors.pieces, self.names)), work)

    def sample(self, num_entries: int) -> Float[Tensor, "task sample"]:
        """About `num_entries` entries of every row, or all if there are fewer, in the widest dtype of all tensors.

        They are short runs, spread over all tensors.
        """
        stride = max(1, self.num_entries // num_entries)
        parts = [self._runs_of(name, stride) for name in self.names]
        if not parts:
            return torch.zeros(len(self.vectors.models), 0)
        dtype = reduce(torch.promote_types, (part.dtype for part in parts))
        return torch.cat([part.to(dtype) for part in parts], dim=1)

    def _runs_of(self, name: str, stride: int) -> Tensor:
        """Every `stride`-th run of neighbouring entries of one tensor, so that few pages of a file are read."""
        base, models = self.vectors.flat(name)
        base, models = _runs(base, stride), [_runs(model, stride) for model in models]
        return widened(base, models, self.operand)[1]


def _runs(flat: Flat, stride: int, length: int = 256) -> Tensor:
    if stride == 1:
        return flat[:]
    blocks = len(flat) // (length * stride)
    if blocks == 0:
        return flat[: max(1, len(flat) // stride)]
    if isinstance(flat, Tensor):
        return flat[: blocks * length * stride].view(blocks, stride, length)[:, 0].reshape(-1)
    first = flat[:length]
    runs = first.new_empty(blocks, length)  # first: runs kept among the buffers of decoding would tear up the heap
    for i in range(blocks):
        runs[i] = flat[i * length * stride : i * length * stride + length]
    return runs.view(-1)


def open_task_vectors(
    base: Source,
    models: Mapping[str, Source] | Sequence[Source],
    *,
    frozen: Sequence[str] = (),
    mixed_dtypes: bool = False,
    threads: int = 0,
    selection: Selection | None = None,
    key: str | None = None,
    device: str = "cpu",
) -> TaskVectors:
    """The opened models; raises `IncompatibleModels` if their headers show that they do not fit together."""
    module = base if isinstance(base, nn.Module) else None
    opened, tuned = open_models(base, models, key)
    if selection:
        tuned, more = select(opened, tuned, selection)
        frozen = (*frozen, *more)
    vectors = TaskVectors(opened, tuned, frozen, threads, device=read_device(device), module=module)
    problems = compatibility(vectors.base, vectors.models, frozen=frozen, mixed_dtypes=mixed_dtypes)
    if problems:
        more = f" (and {len(problems) - 1} more; `suture check` lists them)" if len(problems) > 1 else ""
        raise IncompatibleModels(problems[0] + more)
    return vectors


def read_device(value: Any) -> str:
    """`cpu`, `cuda` or `cuda:N`, if this PyTorch has it; raises `ConfigError`."""
    match = re.fullmatch(r"cpu|cuda(?::([0-9]{1,4}))?", str(value)[:40])
    if match is None:
        raise ConfigError(f"device={shown(value)}: wanted cpu, cuda or cuda:N.")
    available = torch.cuda.device_count() if match[0] != "cpu" else 1
    if int(match[1] or 0) >= available:
        problem = f"device={value}: PyTorch {torch.__version__} finds {available} CUDA devices"
        raise ConfigError(f"{problem}. Remedy: device=cpu.")
    return str(value)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which tensors of this dtype are merged: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _own_stream(device: str) -> AbstractContextManager:
    """A queue of this thread's own on a GPU, so that its copies run beside what other threads compute there."""
    if device == "cpu" or not torch.cuda.is_available():
        return nullcontext()
    streams = _THREAD.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
    return torch.cuda.stream(streams[device])


def _begin_worker() -> None:
    """Make a thread of a pool one that runs torch on one core."""
    torch.set_num_threads(1)
    _THREAD.is_worker = True


def _keep_freed_buffers() -> None:
    """Make glibc keep freed buffers for the next slices, by freeing one large block, which raises its threshold.

    Otherwise each buffer returns to the system, which must clear its pages again: several times the work of merging.
    """
    torch.empty(_LARGE_BLOCK, dtype=torch.uint8)


def working_memory(num_models: int, threads: int = 0, chunk: int = 0) -> int:
    """Bytes of buffers and histograms that merging holds beside the result, whatever the size of the models."""
    buffers = (threads or torch.get_num_threads()) * (chunk or _CHUNK) * _bytes_per_entry(num_models)
    return buffers + num_models * kth_memory(num_models)


def chunk_for(memory: int, method: MergeMethod, num_models: int, threads: int = 0) -> tuple[int, int]:
    """(threads, entries per chunk) that keep the working memory below `memory` bytes; `ConfigError` if none do.

    The number of threads is reduced before slices become short.
    """
    fixed, each = _needs(method, num_models)
    threads, left = threads or torch.get_num_threads(), memory - fixed
    while threads > 1 and left < threads * _SHORT_CHUNK * each:
        threads -= 1
    chunk = left // (threads * each) // _GRAIN * _GRAIN
    if chunk < _GRAIN:
        least = math.ceil((fixed + _GRAIN * each) / 1e6)
        raise ConfigError(f"memory={memory} is too little for {num_models} models. Remedy: give {least}MB or more.")
    return threads, min(_CHUNK, chunk)


def device_chunk_for(memory: int, threads: int) -> int:
    """Entries that are merged on a device at once so that what is held here of them stays below `memory` bytes."""
    return max(_GRAIN, min(_DEVICE_CHUNK, (memory - FIXED_BYTES) // (threads * _BYTES_HERE) // _GRAIN * _GRAIN))


def memory_of(method: MergeMethod, num_models: int, threads: int, chunk: int) -> int:
    """Bytes that merging with a method holds, by the estimate of `chunk_for`."""
    fixed, each = _needs(method, num_models)
    return fixed + threads * chunk * each


def matrix_memory(method: MergeMethod, num_models: int, role: Role, dtype: torch.dtype) -> int:
    """Bytes that a method on matrices holds for one of a tensor's matrices."""
    entries, inner = role.rows * role.columns, role.rows if role.transposed else role.columns
    read = (num_models + 3) * entries * compute_dtype(dtype).itemsize
    return read + 8 * (method.workspace * entries + method.square * inner**2)


def most_at_once(sizes: Iterable[int], threads: int, memory: float) -> int:
    """The most bytes that items of these sizes take side by side on some threads: see `TaskVectors.side_by_side`."""
    ordered = sorted(sizes, reverse=True)
    small = [size for size in ordered if size <= memory / threads]
    return sum(small[:threads]) + (ordered[0] if len(small) < len(ordered) else 0)


def _needs(method: MergeMethod, num_models: int) -> tuple[int, int]:
    """Bytes in all, and bytes per entry that a thread is working on."""
    fixed = max(FIXED_BYTES, num_models * kth_memory(num_models, method.searches))
    wider = 2 if method.takes_position else 1  # random numbers are made from 64-bit hashes
    return fixed, _bytes_per_entry(num_models) * wider


def _bytes_per_entry(num_models: int) -> int:
    return 4 * (3 * num_models + 8)


def widened(
    base: Tensor, models: Sequence[Tensor], operand: str = "deltas", device: str = "cpu"
) -> tuple[Float[Tensor, " entry"], Float[Tensor, "task entry"]]:
    """Base and rows from entries as they are stored; transferred in the file's dtype, then widened."""
    dtype = compute_dtype(base.dtype)
    base = base.to(device).to(dtype)
    rows = base.new_empty(len(models), len(base))
    for row, model in zip(rows, models, strict=True):
        row.copy_(model.to(device))
        if operand == "deltas":
            row -= base
    return base, rows
