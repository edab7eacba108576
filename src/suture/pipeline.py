"""The main job on one screen: open, check, merge, evaluate, report."""

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from suture.checkpoints import Checkpoint, allocate_checkpoint, new_directory, open_checkpoint, provenance
from suture.errors import ConfigError
from suture.evaluation import Row, TaskInputs, evaluate_experts, evaluate_row, evaluation_set
from suture.families import Family, companion_files, family
from suture.merge import merge_task_vectors
from suture.methods import MergeMethod, get_method
from suture.pools import ModelPool, TaskPool
from suture.preflight import Preflight, preflight
from suture.progress import Profile, bar
from suture.task_vectors import TaskVectors


@dataclass(frozen=True)
class Run:
    """Everything that one run is told, checked for what can be checked without opening a file."""

    pool: ModelPool
    taskpool: TaskPool | None
    method: MergeMethod
    knobs: Mapping[str, Any]
    output: Path
    overwrite: bool = False
    threads: int = 0
    batch_size: int = 256
    fast: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Run":
        """Read a composed configuration; raises `ConfigError` for the first value that does not fit."""
        knobs = dict(config["method"])
        method = get_method(knobs.pop("name"))
        for key in ("threads", "batch_size"):
            if not isinstance(config[key], int) or config[key] < (key == "batch_size"):
                raise ConfigError(f"{key}={config[key]!r}: wanted a whole number, {int(key == 'batch_size')} or more.")
        return cls(
            pool=ModelPool.from_config(config["modelpool"]),
            taskpool=TaskPool.from_config(config["taskpool"]) if config.get("taskpool") else None,
            method=method,
            knobs=method.validate(knobs),
            output=Path(config["output"] or _default_output(config, method)),
            overwrite=bool(config["overwrite"]),
            threads=config["threads"],
            batch_size=config["batch_size"],
            fast=bool(config["fast_dev_run"]),
        )


def run_configured(config: Mapping[str, Any]) -> Path | None:
    """One run from its configuration: prints the table and returns the folder; None after a dry run."""
    from suture.report.terminal import print_preflight, print_report

    run = Run.from_config(config)
    models = OpenModels(run)
    found = models.preflight()
    if config["dry_run"]:
        print_preflight(found)
    found.refuse()
    if config["dry_run"]:
        return None
    report = run_pipeline(run, models, config, found.notes)
    if report.rows:
        print_report(report)
    print(f"The merged model and the report are in {run.output}")
    return run.output


def run_pipeline(run: Run, models: "OpenModels", config: Mapping[str, Any], notes: list[str]):
    """Merge into a new folder, score what was merged, write the report; the folder appears when all is done."""
    from suture import config as configuration
    from suture.report import Report, write

    profile = Profile()
    with new_directory(run.output, overwrite=run.overwrite) as folder:
        with profile("merging weights"):
            merged = models.merge_into(folder / "model")
        rows, pretrained, experts = [], None, None
        if run.taskpool is not None:
            inputs = models.inputs(profile)
            with profile("evaluation"):
                pretrained, experts = models.reference_rows(inputs)
                rows = [pretrained, *([experts] if experts else []), models.row(run.method.name, merged, inputs)]
        report = Report(
            title=f"{run.method.name} of {len(run.pool.models)} models",
            rows=rows,
            pretrained=pretrained,
            experts=experts,
            config=config,
            provenance=models.provenance(),
            profile=profile.seconds,
            notes=notes,
            command=_command(),
        )
        write(report, folder)
        configuration.save(dict(config), folder / "config.yaml")
    return report


class OpenModels:
    """The models of a run, opened; weights are read as they are needed."""

    def __init__(self, run: Run):
        self.run = run
        self.kind = family(run.pool.family)
        self.whole_base = open_checkpoint(run.pool.base, label="_pretrained_")
        self.base = self._mergeable(self.whole_base)
        self.models = {n: self._mergeable(open_checkpoint(m, label=n)) for n, m in run.pool.models.items()}

    def preflight(self) -> Preflight:
        """All that can be said before the slow part."""
        run = self.run
        return preflight(
            self.base,
            self.models,
            run.method,
            run.taskpool,
            frozen=self._frozen,
            mixed_dtypes=run.pool.mixed_dtypes,
            output=run.output,
            bytes_written=sum(spec.nbytes for spec in self.whole_base.specs.values()),
            threads=run.threads,
        )

    def merge_into(self, folder: Path) -> dict[str, Tensor]:
        """Write the merged model as its family saves it; returns its merged tensors, memory-mapped from there."""
        folder.mkdir(parents=True)
        stored = self.kind.canonical_names(self.whole_base)
        with allocate_checkpoint(self.whole_base.specs, folder / "model.safetensors", {"format": "pt"}) as tensors:
            vectors = TaskVectors(self.base, self.models, self._frozen, self.run.threads)
            out = {name: tensors[stored[name]] for name in vectors.specs}
            merge_task_vectors(vectors, self.run.method, self.run.knobs, out)
            for name in set(tensors) - set(stored.values()):
                tensors[name].copy_(self.whole_base[name])
        for path in companion_files(self.family.directory):
            (folder / path.name).write_bytes(path.read_bytes())
        return dict(self._mergeable(open_checkpoint(folder)))

    def inputs(self, profile: Profile) -> dict[str, TaskInputs]:
        """The test inputs of all tasks, decoded once, with their heads."""
        assert self.run.taskpool is not None
        with profile("data loading"):
            inputs = evaluation_set(self.family, self.run.taskpool.tasks, "test", bar)
        return {name: _first(task, self.run.batch_size) for name, task in inputs.items()} if self.run.fast else inputs

    def reference_rows(self, inputs: Mapping[str, TaskInputs]) -> tuple[Row, Row | None]:
        """The pretrained model on every task, and each expert on its own; None if a task has no expert."""
        pretrained = self.row("pretrained", self.base, inputs)
        if not set(inputs) <= set(self.models):
            return pretrained, None
        expert = lambda task: self.encoder.load(self.models[task])
        return pretrained, evaluate_experts(expert, inputs, batch_size=self.run.batch_size, track=bar)

    def row(self, name: str, state: Mapping[str, Tensor], inputs: Mapping[str, TaskInputs]) -> Row:
        """One model on every task."""
        return evaluate_row(name, self.encoder.load(state), inputs, batch_size=self.run.batch_size, track=bar)

    def provenance(self) -> dict[str, Any]:
        """Versions and the sha256 of every file that went in."""
        return provenance({"_pretrained_": self.whole_base, **self.models})

    @cached_property
    def family(self) -> Family:
        """The pretrained model's family: encoder, heads, what is saved beside the weights."""
        if self.whole_base.directory is None:
            raise ConfigError(f"'{self.whole_base.label}' is no model directory. Remedy: give one with config and tokenizer.")
        return self.kind(self.whole_base.directory, self.whole_base)

    @cached_property
    def encoder(self):
        """One module that every model of the run is loaded into in turn."""
        return self.family.encoder()

    @property
    def _frozen(self) -> tuple[str, ...]:
        return (*self.run.pool.frozen, *self.run.knobs.get("remove_keys", ()))

    def _mergeable(self, checkpoint: Checkpoint) -> Checkpoint:
        return checkpoint.select(self.kind.canonical_names(checkpoint))


def check_configured(config: Mapping[str, Any]) -> Preflight:
    """The preflight of a run, nothing else."""
    return OpenModels(Run.from_config(config)).preflight()


def _first(task: TaskInputs, count: int) -> TaskInputs:
    from dataclasses import replace

    return replace(task, inputs=task.inputs[:count], labels=task.labels[:count])


def _default_output(config: Mapping[str, Any], method: MergeMethod) -> Path:
    pool = str((config.get("choices") or {}).get("modelpool", "pool")).split("/")[-1]
    return Path("outputs") / pool / method.name / datetime.now().strftime("%Y%m%d-%H%M%S")


def _command() -> str:
    return shlex.join(["suture", *sys.argv[1:]])
