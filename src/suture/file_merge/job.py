"""Merge files: tensor by tensor from the mapped inputs into the shards of a working folder, until all is there."""

import math
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from suture.checkpoints import TensorSpec
from suture.core.progress import bar
from suture.errors import ConfigError
from suture.file_merge.adapters import merge_adapters
from suture.file_merge.inputs import Inputs, open_inputs
from suture.file_merge.layout import Shard, index, index_path, shards
from suture.file_merge.options import Recipe
from suture.file_merge.output import already_there, write_companions
from suture.file_merge.sharing import SharedStream
from suture.file_merge.tensor_knobs import Rules
from suture.file_merge.workspace import Digests, Finished, WorkingFolder, bytes_of
from suture.merging.merge import Merging
from suture.merging.methods.ties_merging import TiesStatistic
from suture.merging.overflow import refuse_overflow
from suture.merging.task_vectors import Piece, TaskVectors, chunk_for, memory_of

_WIDER = "choose a wider dtype or smaller coefficients, or allow it by name with allow_non_finite=[NAME]"


@dataclass
class Job:
    """One merge of files by one process: what it was told, and its opened inputs."""

    recipe: Recipe
    _digests: dict[str, Digests] = field(default_factory=dict)
    _lock: Any = field(default_factory=threading.Lock)

    @cached_property
    def inputs(self) -> Inputs:
        """The opened models, made to fit one another."""
        return open_inputs(self.recipe)

    @cached_property
    def vectors(self) -> TaskVectors:
        """The opened models, with threads and slices that keep the memory's ceiling."""
        recipe = self.recipe
        count = len(self.inputs.models)
        threads, chunk = chunk_for(recipe.memory, recipe.method, count, recipe.threads, recipe.device)
        return TaskVectors(self.inputs.base, self.inputs.models, recipe.frozen, threads, chunk, recipe.device)

    @cached_property
    def settings(self) -> Rules:
        """The knobs of every tensor."""
        return self.recipe.rules(self.vectors.names)

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """Shape and dtype of every tensor of the result but the tied ones."""
        dtype = self.recipe.dtype
        convert = lambda spec: spec._replace(dtype=dtype) if dtype and spec.dtype.is_floating_point else spec
        return {name: convert(spec) for name, spec in self.vectors.specs.items()}

    @cached_property
    def shards(self) -> list[Shard]:
        """The files of the result."""
        return shards(self.specs, self.inputs.base.aliases, self.recipe.shard_size)

    @cached_property
    def folder(self) -> WorkingFolder:
        """Where the result is made."""
        return WorkingFolder(self.recipe.output, self.shards, self.recipe.part)

    @cached_property
    def merging(self) -> Merging:
        """The method, writing into the folder."""
        allowed = self.recipe.may_be_non_finite
        return Merging(self.vectors, self.recipe.method, self.settings.knobs_of, self._write, allowed)

    def run(self) -> bool:
        """Merge what is left of this process's share, and publish if nothing is missing; whether it is published."""
        if self.recipe.adapters:
            return self._merge_adapters()
        work = self.inputs.work(self.recipe)
        if already_there(self.recipe, work):
            return True
        self._check()
        if self.recipe.part[0] == 1:
            self.inputs.hash_beside()
        with self.folder.open(work), self.vectors.workers():
            self._merge_share()
            self.folder.sync()
            with suppress(FileNotFoundError), self.folder.alone():
                if self.folder.model.exists():
                    return self._finish(work)
        return not self.folder.path.exists() and self.recipe.output.exists()  # another process has published it

    def _merge_adapters(self) -> bool:
        recipe = self.recipe
        paths = {name: str(source) for name, source in recipe.models.items()}
        options = {"rank": recipe.rank, "overwrite": recipe.overwrite}
        merge_adapters(paths, recipe.method, recipe.settings, recipe.output, **options)
        return True

    def share(self) -> list[str]:
        """The tensors of this process: every n-th by size, so that the shares take about the same time."""
        i, n = self.recipe.part
        return sorted(self.specs, key=lambda name: (-self.specs[name].nbytes, name))[i - 1 :: n]

    def _check(self) -> None:
        method, vectors = self.recipe.method, self.vectors
        if problem := method.check_number(len(self.inputs.models)):
            raise ConfigError(problem)
        widest = max(map(vectors.row_width, vectors.names), default=0) if method.whole_rows else 0
        if widest > vectors.chunk:
            least = math.ceil(memory_of(method, len(vectors.models), 1, widest) / 1e6)
            raise ConfigError(
                f"memory={self.recipe.memory} is too little for rows of {widest} entries. "
                f"Remedy: give {least}MB or more."
            )
        self.settings.check()

    def _merge_share(self) -> None:
        share = set(self.share())
        finished, sure = self.folder.finished()
        doubtful = [name for name in finished if name in share - sure]
        whole = {name for name in doubtful if self.folder.is_whole(finished[name])}
        for name in whole:
            self.folder.record(finished[name])
        left = [name for name in self.folder.places if name in share - sure - whole]
        if any(name in self.vectors.names for name in left):
            self._gather()
        with bar("merging", len(left)) as advance:
            for name in left:
                self._merge_one(name)
                advance(1)

    def _gather(self) -> None:
        """What the method must know of the whole model: as it was found before, or anew."""
        if not self.merging.whole_model():
            return
        if known := self.folder.statistic():
            thresholds = torch.tensor(known["thresholds"], dtype=getattr(torch, known["dtype"]))
            self.merging.statistic = TiesStatistic(thresholds, known["majority"])
            return
        alone = self.recipe.part[1] == 1
        self.merging.gather(None if alone else SharedStream(self.vectors, self.recipe.method.operand, self.folder))
        found = self.merging.statistic
        dtype = str(found.thresholds.dtype).removeprefix("torch.")
        self.folder.save_statistic(
            {"thresholds": found.thresholds.tolist(), "dtype": dtype, "majority": found.majority}
        )

    def _merge_one(self, name: str) -> None:
        self._digests[name] = Digests()
        pieces = self.vectors.pieces(name, rows=self.recipe.method.whole_rows)
        if name in self.vectors.names:
            votes = self.merging.tensor(name)
        else:
            votes = None
            self._keep(pieces)
        unit = pieces[0].stop if pieces else 1
        finished = Finished(name, unit, self._digests.pop(name).hexdigest())
        if votes is not None:
            finished = replace(finished, votes=votes.count, waiting=[piece.start for piece in votes.waiting])
        self.folder.start_writing_out(name)
        self.folder.record(finished)
        self.inputs.let_go()

    def _keep(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            self._write(piece, self.inputs.base.flat(piece.name)[piece.start : piece.stop])

    def _write(self, piece: Piece, merged: Tensor) -> None:
        """Convert, check and write some entries; called on several threads."""
        part = merged.to(self.specs[piece.name].dtype)
        if part.dtype.is_floating_point and not self.recipe.may_be_non_finite(piece.name):
            refuse_overflow(piece.name, merged, part, start=piece.start, remedy=_WIDER)
        data = bytes_of(part.cpu())
        self.folder.write(piece.name, piece.start, data)
        if piece.name in self._digests:
            digests = self._digests[piece.name]
            digests.add(piece.start, data)

    def _finish(self, work: dict[str, Any]) -> bool:
        """Settle what waited for all tensors, then publish; False if another process has still to do its share."""
        finished, sure = self.folder.finished()
        if set(finished) != set(self.specs) or not set(finished) <= sure:
            return False
        self._settle(finished)
        if len(self.shards) > 1:
            index_path(self.folder.model).write_text(index(self.shards), "utf-8")
        write_companions(self.folder.model, self.recipe, self.inputs, self.specs, work)
        self.folder.publish(self.recipe.overwrite)
        return True

    def _settle(self, finished: dict[str, Finished]) -> None:
        waiting = [found for found in finished.values() if found.waiting]
        if not waiting:
            return
        self._gather()
        self.merging.settle(sum(found.votes for found in finished.values()))
        for found in waiting:
            numel = self.specs[found.name].numel
            pieces = [Piece(found.name, start, min(start + found.unit, numel)) for start in found.waiting]
            if self.merging.again(pieces):
                self.inputs.let_go()
            digest = self.folder.digest(found.name, found.unit)
            self.folder.record(replace(found, sha256=digest, waiting=()))
        self.folder.sync()
