"""The models of a run, opened: checked, merged into a folder, scored. Weights are read as they are needed."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from suture.adaptation import save_coefficients
from suture.checkpoints import (
    Checkpoint,
    allocate_checkpoint,
    open_checkpoint,
    open_fine_tuned,
    provenance,
    save_checkpoint,
)
from suture.core.fabric import OneDevice
from suture.core.progress import Profile, bar
from suture.evaluation import Row, TaskInputs, evaluate_experts, evaluate_row, evaluation_set, expert_matrix
from suture.families import Family, family
from suture.merging.merge import merge_task_vectors
from suture.merging.registry import MergeMethod
from suture.merging.task_vectors import TaskVectors
from suture.pipeline.adamerging import Adapted
from suture.pipeline.context import Stage
from suture.pipeline.methods import LearnedMethod
from suture.pipeline.preflight import Preflight, preflight
from suture.pipeline.repairs import Repair, Repaired
from suture.pipeline.settings import Run
from suture.tasks import Split

_MEASURED: dict[str, tuple[Row, Row | None]] = {}  # what the jobs of a sweep have in common


@dataclass(frozen=True)
class Merged:
    """One merged model on disk, how it was learned, if it was, and what repaired it."""

    tensors: Mapping[str, Tensor]
    adapted: Adapted | None = None
    repaired: tuple[Repaired, ...] = ()
    notes: tuple[str, ...] = ()


class OpenModels:
    """The pool of a run, opened. The family of the pretrained model says how its tensors are named and saved."""

    def __init__(self, run: Run, profile: Profile | None = None):
        self.run, self.profile = run, profile or Profile()
        self.whole_base = open_checkpoint(run.pool.base, label="_pretrained_")
        tuned: dict[str, Checkpoint] = {}
        kind, settings = family(run.pool.family), run.pool.settings
        #: The pretrained model's family: names, encoder, heads, what is saved beside the weights.
        self.family: Family = kind(self.whole_base.directory, self.whole_base, settings, tuned)
        self.base = self.mergeable(self.whole_base)
        stored = self.family.canonical_names(self.whole_base)
        told = lambda names: {stored.get(c, c): name for c, name in self.family.canonical_names(names).items()}
        for name, model in run.pool.models.items():
            tuned[name] = open_fine_tuned(model, self.whole_base, label=name, canonical_names=told)
        self.models = {name: self.mergeable(model) for name, model in tuned.items()}
        self.inputs = cache(self._decode)
        self.provenance = cache(lambda: provenance({"_pretrained_": self.whole_base, **self.models}))

    def preflight(self) -> Preflight:
        """All that can be said before the slow part."""
        run = self.run
        static = run.method if isinstance(run.method, MergeMethod) else None
        found = preflight(
            self.base,
            self.models,
            static,
            run.taskpool,
            knobs=run.knobs,
            frozen=run.frozen,
            mixed_dtypes=run.pool.mixed_dtypes,
            output=run.output,
            bytes_written=sum(spec.nbytes for spec in self.whole_base.specs.values()),
            threads=run.threads,
        )
        tasks = run.taskpool.tasks if run.taskpool else ()
        found.problems[:0] = dict.fromkeys(problem for task in tasks for problem in self.family.problems(task))
        if not self.base.specs:
            first, kind = next(iter(self.whole_base), "no tensor"), self.family.name
            remedy = "name another family in the pool, or merge files of any kind by suture merge."
            problem = f"_pretrained_ has no tensor that family={kind} merges (it has '{first}', …)."
            found.problems.insert(0, f"{problem} Remedy: {remedy}")
        if not found.problems:
            self._foresee_learning(found, run)
        return found

    def merge_into(self, folder: Path, run: Run) -> Merged:
        """Write `model` as its family saves it, and beside it what was learned and what repairs it."""
        (folder / "model").mkdir(parents=True)
        stage = self.stage(run, folder)
        learns = isinstance(run.method, LearnedMethod)
        adapted = run.method.knobs.function(**run.knobs).run(stage) if learns else None
        self._write(folder / "model", run, adapted)
        if adapted is not None:
            _save_learned(adapted, folder)
        tensors = dict(self.mergeable(open_checkpoint(folder / "model")))
        repaired = tuple(self._repair(repair, stage, run, tensors) for repair in run.repairs)
        return Merged(tensors, adapted, repaired, tuple(stage.taken_up()))

    def merged_in_memory(self) -> Merged:
        """Merge by a method that learns, and repair, leaving nothing but the states of loops."""
        run = self.run
        with TemporaryDirectory() as folder:
            stage = self.stage(run, Path(folder))
            stage.fabric = {**stage.fabric, "loggers": {"kind": "none"}}
            adapted = run.method.knobs.function(**run.knobs).run(stage)
            tensors = adapted.result.merged
            return Merged(tensors, adapted, tuple(self._repair(repair, stage, run, tensors) for repair in run.repairs))

    def _repair(self, repair: Repair, stage: Stage, run: Run, tensors: Mapping[str, Tensor]) -> Repaired:
        with TemporaryDirectory(prefix=".encodings-", dir=stage.folder) as encodings:
            repaired = repair.run(stage, run.label, tensors, Path(encodings))
        several = len(run.repairs) > 1
        repaired.save(stage.folder / (f"surgery_{repair.kind}.safetensors" if several else "surgery.safetensors"))
        return repaired

    def stage(self, run: Run, folder: Path) -> Stage:
        """The surroundings of a method that learns."""
        return Stage(
            vectors=self._vectors(run),
            build=lambda: self.family.encoder(),
            tasks=run.taskpool.tasks if run.taskpool else (),
            decode=self.inputs,
            fingerprint=lambda: {"models": self.provenance()["inputs"], "tasks": str(run.taskpool)},
            folder=folder,
            fabric=run.fabric,
            seed=run.seed,
            batch_size=run.batch_size,
            fast=run.fast,
            profile=self.profile,
        )

    def score(self, models: Mapping[str, Mapping[str, Tensor] | Merged]) -> tuple[list[Row], Row, Row | None]:
        """The rows of the table, then again the pretrained model's and the experts' (None if a task has no expert)."""
        with self.profile("data loading"):
            inputs = self.inputs("test")
        with self.profile("evaluation"):
            pretrained, experts = self._references(inputs)
            rows = [row for name, model in models.items() for row in self._rows(name, model, inputs)]
        return [pretrained, *([experts] if experts else []), *rows], pretrained, experts

    def matrix(self) -> list[Row]:
        """Every fine-tuned model of the pool on every task."""
        expert = lambda name: self.encoder.load(self.models[name])
        return expert_matrix(expert, self.inputs("test"), self.models, **self._how)

    @cached_property
    def encoder(self):
        """One module that every model of the run is loaded into in turn."""
        return self.new_encoder()

    def new_encoder(self):
        """A module with the pretrained weights, on the device of the run."""
        return self.family.encoder().eval().to(self._one_device.device)

    def mergeable(self, checkpoint: Checkpoint) -> Checkpoint:
        """The tensors of a checkpoint that a merge works on, under the family's canonical names."""
        return checkpoint.select(self.family.canonical_names(checkpoint))

    @cached_property
    def _one_device(self) -> OneDevice:
        return OneDevice(self.run.fabric)

    @property
    def _how(self) -> dict[str, Any]:
        """How models are scored."""
        return {"batch_size": self.run.batch_size, "track": bar, "forward": self._one_device.call}

    def _vectors(self, run: Run) -> TaskVectors:
        return TaskVectors(self.base, self.models, run.frozen, run.threads)

    def _foresee_learning(self, found: Preflight, run: Run) -> None:
        stage = self.stage(run, run.output)
        for repair in run.repairs:
            found.problems += repair.problems(stage)
        if isinstance(run.method, LearnedMethod):
            method = run.method.knobs.function(**run.knobs)
            found.problems += method.problems(stage)
            found.memory = method.memory(stage)

    def _write(self, folder: Path, run: Run, adapted: Adapted | None) -> None:
        base = self.family.kept(self.whole_base)
        stored = self.family.canonical_names(base)
        with allocate_checkpoint(base.specs, folder / "model.safetensors", aliases=base.aliases) as tensors:
            vectors = self._vectors(run)
            out = {name: tensors[stored[name]] for name in vectors.specs}
            if isinstance(run.method, MergeMethod):
                with self.profile("merging weights"):
                    merge_task_vectors(vectors, run.method, run.knobs, out)
            for name, tensor in adapted.result.merged.items() if adapted else ():
                out[name].copy_(tensor)
            for name in set(tensors) - set(stored.values()):
                tensors[name].copy_(base[name])
        self.family.complete(folder)

    def _decode(self, split: Split) -> dict[str, TaskInputs]:
        assert self.run.taskpool is not None
        first = self.run.batch_size if self.run.fast else None
        return evaluation_set(self.family, self.run.taskpool.tasks, split, bar, first)

    def _references(self, inputs: Mapping[str, TaskInputs]) -> tuple[Row, Row | None]:
        """The rows of the pretrained model and of the experts; with `reuse` measured once in this process."""
        measured = lambda: (self._row("pretrained", self.base, inputs), self._experts(inputs))
        data = {name: task.identity for name, task in inputs.items()}
        if not self.run.reuse or None in data.values():
            return measured()
        run, models = self.run, self.provenance()["inputs"]
        key = str((models, data, run.pool, run.taskpool, run.fabric, run.batch_size, torch.get_num_threads()))
        if key not in _MEASURED:
            _MEASURED[key] = measured()
        return _MEASURED[key]

    def _experts(self, inputs: Mapping[str, TaskInputs]) -> Row | None:
        if not set(inputs) <= set(self.models):
            return None
        expert = lambda task: self.encoder.load(self.models[task])
        return evaluate_experts(expert, inputs, **self._how)

    def _rows(self, name: str, model: Mapping[str, Tensor] | Merged, inputs: Mapping[str, TaskInputs]) -> list[Row]:
        if not isinstance(model, Merged):
            return [self._row(name, model, inputs)]
        repaired = [row for repair in model.repaired for row in repair.rows]
        return [self._row(name, model.tensors, inputs), *repaired]

    def _row(self, name: str, state: Mapping[str, Tensor], inputs: Mapping[str, TaskInputs]) -> Row:
        return evaluate_row(name, self.encoder.load(state), inputs, **self._how)


def _save_learned(adapted: Adapted, folder: Path) -> None:
    """The coefficients under the name that was asked for, and beside them as safetensors with their whole history."""
    result = adapted.result
    if adapted.save_as is not None:
        save_coefficients(result.coefficients, folder / adapted.save_as)
    save_coefficients(result.coefficients, folder / "coefficients.safetensors")
    save_checkpoint({"coefficients": result.history, "losses": result.losses}, folder / "history.safetensors")
