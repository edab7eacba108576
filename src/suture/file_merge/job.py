"""One process of a file merge: tensor by tensor from the mapped inputs into the working folder, until all is there."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from suture.checkpoints import TensorSpec
from suture.checkpoints.checkpoint import Codes
from suture.core.progress import Profile, bar
from suture.errors import PRETRAINED, ConfigError, OutputError
from suture.file_merge.adapters import merge_adapters
from suture.file_merge.encoding import codes_of, error_line, record_error, write_encoded
from suture.file_merge.inputs import Inputs, open_inputs
from suture.file_merge.layout import Shard, file_stem, split_into_shards, write_index
from suture.file_merge.masks import write_masks
from suture.file_merge.options import MergeOptions
from suture.file_merge.output import write_companions
from suture.file_merge.records import Digests, TensorRecord
from suture.file_merge.sharing import SharedStream
from suture.file_merge.statistic import as_json, from_json, statistic_type
from suture.file_merge.tensor_knobs import TensorKnobs
from suture.file_merge.workspace import WorkingFolder, bytes_of, damaged, recorded_work
from suture.merging.overflow import refuse_overflow
from suture.merging.task_vectors import FIXED_BYTES, Piece, TaskVectors, chunk_for, device_chunk_for, memory_of
from suture.merging.tensorwise import Merging
from suture.merging.wrapping import Wrapping
from suture.storage.atomic import check_replaceable
from suture.storage.remote import BLOCKS

_WIDER = "choose a wider dtype or smaller coefficients, or allow it by name with allow_non_finite=[NAME]"

_BLOCKS = 1 << 26  # bytes of remote files that are held at most
_MAPPED = 1 << 26  # bytes of the result after which pages of the inputs are let go


@dataclass
class Job:
    """One merge of files by one process: its options, what is opened for it when it is asked for, and notes on it."""

    options: MergeOptions
    notes: list[str] = field(default_factory=list)
    _digests: dict[str, Digests] = field(default_factory=dict)
    _merged_bytes: int = 0

    @cached_property
    def inputs(self) -> Inputs:
        """The opened models, made to fit one another."""
        return open_inputs(self.options)

    @cached_property
    def vectors(self) -> TaskVectors:
        """The opened models, with threads and slices that keep the memory's ceiling."""
        options = self.options
        count, memory = len(self.inputs.models), options.memory
        held = min(_BLOCKS, memory // 4) if self.inputs.remote else 0
        memory -= held
        threads, chunk = chunk_for(memory, options.method, count, options.threads)
        if held:
            BLOCKS.limit(held, (count + 1) * threads)
        return TaskVectors(
            self.inputs.base,
            self.inputs.models,
            self.inputs.frozen,
            threads,
            chunk,
            options.device,
            device_chunk=device_chunk_for(memory, threads),
        )

    @cached_property
    def knobs(self) -> TensorKnobs:
        """The knobs of every tensor."""
        return self.options.tensor_knobs(self.vectors.names)

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """Shape and dtype of every tensor of the result but the tied ones."""
        codes = self.codes
        specs = self.vectors.specs.items()
        return {n: self._converted(s) if n not in codes else s._replace(dtype=torch.float32) for n, s in specs}

    @cached_property
    def codes(self) -> dict[str, Codes]:
        """The base's codes in which tensors are written again; until then these are float32."""
        if not self.options.encode:
            return {}
        return codes_of(self.inputs.opened[PRETRAINED], self.vectors.specs)

    def _converted(self, spec: TensorSpec) -> TensorSpec:
        dtype = self.options.dtype
        return spec._replace(dtype=dtype) if dtype and spec.dtype.is_floating_point else spec

    @cached_property
    def shards(self) -> list[Shard]:
        """The files of the result."""
        return split_into_shards(self.specs, self.inputs.base.aliases, self.options.shard_size, self.stem)

    @cached_property
    def stem(self) -> str:
        """The name of the weights' files, before its number and .safetensors."""
        return file_stem(self.inputs.opened[PRETRAINED].files)

    @cached_property
    def folder(self) -> WorkingFolder:
        """The folder in which the result is made."""
        return WorkingFolder(self.options.output, self.shards, self.options.part, self._is_published)

    @cached_property
    def merging(self) -> Merging | Wrapping:
        """The method with its wrappers, writing into the folder."""
        return self.merging_into(self._write)

    def merging_into(self, write: Callable[[Piece, Tensor], None]) -> Merging | Wrapping:
        """The method with its wrappers, which gives merged slices to `write`."""
        allowed, after = self.options.may_be_non_finite, self.options.after
        method, memory = self.options.method, self.options.memory - FIXED_BYTES
        merging = Merging(self.vectors, method, self.knobs.knobs_of, write, allowed, memory=memory)
        return Wrapping(merging, after, write) if after else merging

    def run(self) -> bool:
        """Merge what is left of this process's share, and publish if nothing is missing; whether it is published."""
        destination = self.options.destination
        if destination is None:
            return self._run()
        work = None if self.options.adapters else _as_json(self.inputs.work(self.options))
        return destination.hold(work, self._run, overwrite=self.options.overwrite)

    def _run(self) -> bool:
        if self.options.adapters:
            return self._merge_adapters()
        work = self.inputs.work(self.options)
        if self._already_there(work):
            return True
        if self.options.masks:
            write_masks(self.options, self.inputs, self.vectors, _as_json(work))
            return True
        self._check()
        if self.options.part[0] == 1:
            self.inputs.hash_beside()
        with self.folder.open(work) as begun:
            if begun:
                self._do_share(work)
        self.folder.tidy()
        return self._is_published(work)

    def _already_there(self, work: Mapping[str, Any]) -> bool:
        """Whether the output is the result of this very merge; `OutputError` if it may not be replaced."""
        if self._is_published(work):
            self.folder.discard()  # a kill came after the result got its name
            return True
        try:
            check_replaceable(self.options.output, self.options.overwrite, inputs=self.inputs.paths)
        except OutputError:
            if not self._is_published(work):  # by another share, in this moment
                raise
        return self._is_published(work)

    def _is_published(self, work: Mapping[str, Any]) -> bool:
        """Whether the result of this work has its name, or was sent to where it belongs."""
        destination = self.options.destination
        if destination is not None and destination.has(_as_json(work)):
            return True
        return recorded_work(self.options.output) == _as_json(work)

    def _do_share(self, work: Mapping[str, Any]) -> None:
        """Merge this process's share, and publish the result if nothing else is missing."""
        with self.vectors.workers():
            with Profile()("merging files"):
                self._merge_share()
            self.inputs.check_unchanged()
            self.folder.record_synced()
            with self.folder.alone():
                if self.folder.model.exists():
                    self._finish(work)

    def _merge_adapters(self) -> bool:
        options = self.options
        paths = {name: str(source) for name, source in options.models.items()}
        if options.after:
            raise ConfigError("method.after is not for adapters. Remedy: give base=PATH, for a whole model.")
        choices = {"rank": options.rank, "space": options.space, "overwrite": options.overwrite}
        self.notes += merge_adapters(paths, options.method, options.knobs, options.output, **choices)
        return True

    def share(self) -> list[str]:
        """The tensors of this process: every n-th by size, so that the shares take about the same time."""
        i, n = self.options.part
        return sorted(self.specs, key=lambda name: (-self.specs[name].nbytes, name))[i - 1 :: n]

    def _check(self) -> None:
        method, vectors = self.options.method, self.vectors
        widest = max(map(vectors.row_width, vectors.names), default=0) if method.whole_rows else 0
        if widest > vectors.chunk:
            least = math.ceil(memory_of(method, len(vectors.models), 1, widest) / 1e6)
            raise ConfigError(
                f"memory={self.options.memory} is too little for rows of {widest} entries. "
                f"Remedy: give {least}MB or more."
            )
        self.knobs.check()
        self.merging.check()

    def _merge_share(self) -> None:
        """Merge what no process has finished, and read back all tensors of the share."""
        share = set(self.share())
        records, synced = self.folder.records()
        earlier = [record for name, record in records.items() if name in share]
        intact = {record.name for record, whole in self._read_back(earlier) if whole}
        self.folder.withdraw_unsynced()
        for name in intact - synced:
            self.folder.record(records[name])
        left = [name for name in self.folder.locations if name in share - intact]
        if any(name in self.vectors.names for name in left):
            self._gather()
            self.merging.prepare()
        with bar("merging", len(left)) as advance:
            written = []
            for record in self.merging.each(left, self._merge_one):
                self.folder.record(record)
                written.append(record)
                advance(1)
        self.folder.sync_files()
        self._verify(written)

    def _read_back(self, records: Iterable[TensorRecord]) -> Iterable[tuple[TensorRecord, bool]]:
        """Each record, and whether the tensor in the file is the one that was written."""
        with self.vectors.workers() as pool:
            records = list(records)
            return zip(records, list(pool.map(self.folder.is_intact, records)), strict=True)

    def _verify(self, records: Iterable[TensorRecord]) -> None:
        for record, whole in self._read_back(records):
            if not whole:
                raise damaged(self.folder.model / self.folder.locations[record.name].file, f"'{record.name}'")

    def _gather(self) -> None:
        """Gather the statistic of the whole model, or take the one that was saved."""
        if not self.merging.whole_model():
            return
        kind = statistic_type(self.options.method)
        if kind is not None and (saved := self.folder.statistic(partial(from_json, kind))) is not None:
            self.merging.statistic = saved
            return
        alone = self.options.part[1] == 1
        self.merging.gather(None if alone else SharedStream(self.vectors, self.options.method.operand, self.folder))
        if kind is not None:
            self.folder.save_statistic(as_json(self.merging.statistic))

    def _merge_one(self, name: str) -> TensorRecord:
        self._digests[name] = Digests()
        pieces = self.merging.pieces(name)
        votes = None
        if name in self.vectors.names:
            votes = self.merging.tensor(name)
        else:
            self._copy_from_base(pieces)
        unit = pieces[0].stop if pieces else 1
        record = TensorRecord(name, unit, self._digests.pop(name).hexdigest())
        if votes is not None:
            record = replace(record, votes=votes.count, waiting=[piece.start for piece in votes.waiting])
        self.folder.start_writing_out(name)
        self._merged_bytes += self.specs[name].nbytes
        if self._merged_bytes >= _MAPPED:  # of tensors side by side, none has to map its pages anew for each small one
            self._merged_bytes = 0
            self.inputs.let_go()
        return record

    def _copy_from_base(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            self._write(piece, self.inputs.base.flat(piece.name)[piece.start : piece.stop])

    def _write(self, piece: Piece, merged: Tensor) -> None:
        """Convert, check and write some entries; called on several threads."""
        part = merged.to(self.specs[piece.name].dtype)
        if part.dtype.is_floating_point and not self.options.may_be_non_finite(piece.name):
            refuse_overflow(piece.name, merged, part, start=piece.start, remedy=_WIDER)
        data = bytes_of(part.cpu())
        self.folder.write(piece.name, piece.start, data)
        self._digests[piece.name].add(piece.start, data)

    def _finish(self, work: Mapping[str, Any]) -> None:
        """Settle what waited for all tensors, then publish, unless another process has still to do its share."""
        records, synced = self.folder.records()
        if set(records) != set(self.specs) or not set(records) <= synced:
            return
        share = set(self.share())  # which this process has read back
        if not all(whole for _, whole in self._read_back(r for r in records.values() if r.name not in share)):
            return  # whoever does that share again mends it
        self._settle(records)
        write_index(self.folder.model, self.shards, self.stem)
        self.folder.check_headers()
        folder = self._encoded() if self.codes else self.folder.model
        plain = {name: spec for name, spec in self.specs.items() if name not in self.codes}
        write_companions(folder, self.options, self.inputs, plain, work)
        if self.codes:
            self.notes.append(error_line(record_error(self.folder.model, folder, self.codes)))
        self.inputs.check_unchanged()
        self.folder.publish(folder, self.options.overwrite, self.inputs.paths)

    def _encoded(self) -> Path:
        """A folder with the merged weights in the base's codes."""
        folder = self.folder.new_folder("encoded")
        unchanged = self.codes.keys() - set(self.vectors.names)
        write_encoded(self.folder.model, folder, self.codes, unchanged, self.options.shard_size, self.stem)
        return folder

    def _settle(self, records: Mapping[str, TensorRecord]) -> None:
        """Merge anew the slices whose columns cancel, now that the votes of all tensors are counted."""
        waiting = [record for record in records.values() if record.waiting]
        if not waiting:
            return
        self._gather()
        self.merging.settle(sum(record.votes for record in records.values()))
        settled = [self._settle_one(record) for record in waiting]
        self.folder.sync_files()
        self._verify(settled)
        self.folder.record_synced()

    def _settle_one(self, record: TensorRecord) -> TensorRecord:
        numel = self.specs[record.name].numel
        pieces = [Piece(record.name, start, min(start + record.unit, numel)) for start in record.waiting]
        digests = self._digests[record.name] = self.folder.digests(record.name, record.unit)
        if self.merging.again(pieces):
            self.inputs.let_go()
        del self._digests[record.name]
        settled = replace(record, sha256=digests.hexdigest(), waiting=())
        self.folder.record(settled)
        return settled


def _as_json(work: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(work))
