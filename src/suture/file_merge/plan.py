"""The plan of a file merge: bytes, passes, memory, and the time on this machine, from short measurements."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor

from suture.checkpoints import Checkpoint, open_checkpoint
from suture.core.names import in_bytes
from suture.errors import ConfigError
from suture.file_merge.job import Job
from suture.file_merge.records import Digests
from suture.file_merge.workspace import bytes_of
from suture.merging.compatibility import spec_of
from suture.merging.task_vectors import FIXED_BYTES, Piece, TaskVectors, memory_of
from suture.merging.tensorwise import Merging
from suture.merging.wrapping import Wrapping
from suture.storage.atomic import write_at
from suture.storage.speeds import duration, probe_file, read_speed, timed, write_speed

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
            f"time     {duration(self.seconds)} for this share, all in all",
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
        read_speed=read_speed([path for c in job.inputs.opened.values() for path in c.files]),
        write_speed=write_speed(job.options.output),
        compute_speed=_matrix_speed(job) if matrices else _compute_speed(job),
        matrix=max(map(job.merging.needs, vectors.names), default=0),
    )


def _encoded_bytes(job: Job) -> int:
    """Bytes of the result in the base's codes, which is written after the plain one."""
    if not job.codes:
        return 0
    plain = sum(spec.nbytes for name, spec in job.specs.items() if name not in job.codes)
    return plain + sum(spec.nbytes for each in job.codes.values() for spec in each.specs.values())


def _compute_speed(job: Job) -> float:
    """Bytes of inputs a second, with the files in memory: a few slices of the largest tensor, hashed and written."""
    vectors, method = job.vectors, job.options.method
    if not vectors.names:
        return float("inf")
    name = max(vectors.names, key=lambda name: vectors.base.specs[name].numel)
    pieces = vectors.pieces(name, rows=method.whole_rows)[:_PIECES]
    dtype = job.specs[name].dtype
    with probe_file(job.options.output) as descriptor:

        def take(piece: Piece, merged: Tensor) -> None:
            data = bytes_of(merged.to(dtype).cpu())
            Digests().add(piece.start, data)
            write_at(descriptor, data, piece.start * dtype.itemsize)

        merging = Merging(_few(vectors, name, pieces[-1].stop), method, job.knobs.knobs_of, take)
        with merging.vectors.workers():
            merging.tensor(name)
            job.inputs.let_go()  # so that pages are mapped anew, as they are for each tensor
            seconds = timed(lambda: merging.tensor(name))
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
        seconds = timed(lambda: list(one.each([name], one.tensor)))
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
