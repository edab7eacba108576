"""The plan of a file merge: bytes, passes, memory, and the time on this machine, from short measurements."""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from suture.checkpoints import Checkpoint, open_checkpoint
from suture.core.names import in_bytes
from suture.errors import ConfigError
from suture.file_merge.job import Job
from suture.file_merge.workspace import Digests, bytes_of
from suture.merging.compatibility import spec_of
from suture.merging.merge import Merging
from suture.merging.task_vectors import FIXED_BYTES, Piece, TaskVectors, memory_of
from suture.merging.wrapping import Wrapping
from suture.storage.atomic import disk_errors, scratch_file, write_at

_PROBE = 1 << 26  # bytes that are read and written to measure the disk
_MOMENT = 8 * 1024**3  # multiplications of the matrix that is merged to measure a method on matrices
_PIECES = 24  # slices that are merged to measure the method


@dataclass(frozen=True)
class Plan:
    """Sizes are bytes, speeds bytes a second; `compute_speed` counts the bytes of the inputs. One share's figures.

    `matrix` is what the largest matrix takes, for a method on whole matrices, which `memory=` cannot make smaller.
    """

    tensors: int
    parameters: int
    shards: int
    passes: int
    bytes_read: int
    bytes_written: int
    memory: int
    threads: int
    read_speed: float
    write_speed: float
    compute_speed: float
    matrix: int = 0

    @property
    def seconds(self) -> float:
        """Reading and writing share the disk; computing goes on beside them."""
        disk = self.bytes_read / self.read_speed + self.bytes_written / self.write_speed
        return max(disk, self.bytes_read / self.passes / self.compute_speed)

    def __str__(self) -> str:
        passes = f"{self.passes} pass{'es' * (self.passes > 1)}"
        lines = [
            f"merge    {self.tensors} tensors, {self.parameters:,} parameters",
            f"read     {in_bytes(self.bytes_read)} in {passes}, the disk gives {in_bytes(self.read_speed)}/s",
            f"write    {in_bytes(self.bytes_written)}, the disk takes {in_bytes(self.write_speed)}/s",
            f"compute  {in_bytes(self.compute_speed)}/s of inputs on {self.threads} threads",
            f"memory   {in_bytes(self.memory)} at most, beside what the system caches of files",
            *([f"matrix   {in_bytes(self.matrix)} for the largest, whatever memory= says"] if self.matrix else []),
            f"time     {_duration(self.seconds)} for this share, all in all",
        ]
        return "\n".join(lines)


def make_plan(job: Job) -> Plan:
    """Measure disk and method for about a second each, and say what the share of a job will take.

    A probe is written beside the output and removed. Nothing is merged.
    """
    if job.options.masks:
        raise ConfigError(f"There is no plan for {job.options.method.name}, which writes masks. Remedy: plan=false.")
    share = set(job.share())
    vectors, whole = job.vectors, job.merging.whole_model()
    models = [job.inputs.base, *job.inputs.models.values()]

    def read(names: Iterable[str]) -> int:
        return sum(spec_of(model, name).nbytes for model in models for name in names if name in model)

    merged = [name for name in vectors.names if name in share]
    before = job.options.method.times_read(job.knobs.knobs_of(vectors.names[0])) - 1 if whole else 0
    gathered = before * read(vectors.names) // job.options.part[1]  # the processes share it
    slices = memory_of(job.options.method, len(models) - 1, vectors.threads, vectors.chunk)
    matrices = job.options.method.matrices or any(wrapper.matrices for wrapper, _ in job.options.after)
    return Plan(
        tensors=len(share),
        parameters=sum(job.specs[name].numel for name in share),
        shards=len(job.shards),
        passes=1 + before + job.merging.passes,
        bytes_read=read(merged) + gathered + job.merging.passes * read(vectors.names),
        bytes_written=sum(job.specs[name].nbytes for name in share) + _encoded_bytes(job),
        memory=max(slices, FIXED_BYTES + job.merging.held()) if matrices else slices,
        threads=vectors.number_of_threads,
        read_speed=_read_speed([path for c in job.inputs.opened.values() for path in c.files]),
        write_speed=_write_speed(job.options.output),
        compute_speed=_matrix_speed(job) if matrices else _compute_speed(job),
        matrix=max(map(job.merging.needs, vectors.names), default=0),
    )


def _encoded_bytes(job: Job) -> int:
    """Bytes of the result in the base's codes, which is written after the plain one."""
    if not job.codes:
        return 0
    plain = sum(spec.nbytes for name, spec in job.specs.items() if name not in job.codes)
    return plain + sum(spec.nbytes for each in job.codes.values() for spec in each.specs.values())


def _read_speed(files: list[Path]) -> float:
    """Of one input, from the disk and not from what the system has in memory."""
    if not files:
        return float("inf")
    path = max(files, key=lambda path: path.stat().st_size)
    size = min(_PROBE, path.stat().st_size)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, size, os.POSIX_FADV_DONTNEED)
        return size / _timed(lambda: [os.pread(descriptor, 1 << 20, at) for at in range(0, size, 1 << 20)])
    finally:
        os.close(descriptor)


def _write_speed(output: Path) -> float:
    data = memoryview(os.urandom(1 << 20))
    with _probe(output) as descriptor:

        def write() -> None:
            for offset in range(0, _PROBE, 1 << 20):
                write_at(descriptor, data, offset)
            os.fsync(descriptor)

        return _PROBE / _timed(write)


def _compute_speed(job: Job) -> float:
    """Bytes of inputs a second, with the files in memory: a few slices of the largest tensor, hashed and written."""
    vectors, method = job.vectors, job.options.method
    if not vectors.names:
        return float("inf")
    name = max(vectors.names, key=lambda name: vectors.base.specs[name].numel)
    pieces = vectors.pieces(name, rows=method.whole_rows)[:_PIECES]
    dtype = job.specs[name].dtype
    with _probe(job.options.output) as descriptor:

        def take(piece: Piece, merged: Tensor) -> None:
            data = bytes_of(merged.to(dtype).cpu())
            Digests().add(piece.start, data)
            write_at(descriptor, data, piece.start * dtype.itemsize)

        merging = Merging(_few(vectors, name, pieces[-1].stop), method, job.knobs.knobs_of, take)
        with merging.vectors.workers():
            merging.tensor(name)
            job.inputs.let_go()  # so that pages are mapped anew, as they are for each tensor
            seconds = _timed(lambda: merging.tensor(name))
    each = sum(spec_of(m, name).dtype.itemsize for m in [vectors.base, *vectors.models.values()])
    return each * pieces[-1].stop / seconds


def _matrix_speed(job: Job) -> float:
    """Bytes of inputs a second, from one matrix that takes no more than a moment: work grows with its sides' cubes."""
    merging, vectors = job.merging, job.vectors
    work = {name: _work(merging, name) for name in vectors.names if merging.needs(name)}
    if not work:
        return _compute_speed(job)
    name = max((n for n in work if work[n] <= _MOMENT), key=lambda n: work[n], default=min(work, key=lambda n: work[n]))
    one = job.merging_into(lambda piece, merged: None)
    with vectors.workers():
        seconds = _timed(lambda: list(one.each([name], one.tensor)))
    models = [vectors.base, *vectors.models.values()]
    size = sum(spec_of(model, each).nbytes for model in models for each in vectors.names)
    at_once = min(vectors.number_of_threads, max(1, merging.held() // max(map(merging.needs, work))))
    return size * at_once / (seconds * sum(work.values()) / work[name])


def _work(merging: Merging | Wrapping, name: str) -> float:
    """The cost of a tensor's matrices, relative to one another."""
    role = merging.role(name)
    inner = role.rows if role.transposed else role.columns
    tasks, square = len(merging.vectors.models), merging.method.square
    least = inner if square else min(role.rows, role.columns)
    return role.count * (tasks * role.rows * role.columns * least + (inner**3 if square else 0))


def _few(vectors: TaskVectors, name: str, count: int) -> TaskVectors:
    """The first entries of one tensor as models of their own, still mapped."""
    width = vectors.row_width(name)
    shape = (-1, width) if count % width == 0 else (count,)

    def first_entries(checkpoint: Checkpoint) -> Checkpoint:
        return open_checkpoint({name: checkpoint.flat(name)[:count].view(shape)})

    models = {label: first_entries(model) for label, model in vectors.models.items()}
    return replace(vectors, base=first_entries(vectors.base), models=models, frozen=())


@contextmanager
def _probe(output: Path) -> Iterator[int]:
    """A descriptor of a file on the output's disk, which is removed again."""
    folder = next(folder for folder in output.absolute().parents if folder.exists())
    with disk_errors(output), scratch_file(folder) as descriptor:
        yield descriptor


def _timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return max(time.perf_counter() - start, 1e-9)


def _duration(seconds: float) -> str:
    """45 s, 12 min, 3.5 h.

    >>> _duration(45), _duration(720), _duration(12600)
    ('45 s', '12 min', '3.5 h')
    """
    if seconds < 120:
        return f"{max(1, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
