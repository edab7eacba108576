"""The main job on one screen: open, check, merge, evaluate, report."""

import shlex
import sys
from collections.abc import Mapping, Sequence
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
from suture.methods import MergeMethod, get_method, methods
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
            knobs=method.knobs.validate(knobs),
            output=Path(config["output"] or _default_output(config, method)),
            overwrite=bool(config["overwrite"]),
            threads=config["threads"],
            batch_size=config["batch_size"],
            fast=bool(config["fast_dev_run"]),
        )

    @property
    def frozen(self) -> tuple[str, ...]:
        """The tensors that stay at the base."""
        return (*self.pool.frozen, *self.knobs.get("remove_keys", ()))


def run_configured(config: Mapping[str, Any]) -> Path | None:
    """One run from its configuration: prints the table and returns the folder; None after a dry run."""
    from suture.report.terminal import print_preflight

    run = Run.from_config(config)
    models = OpenModels(run)
    found = models.preflight()
    if config["dry_run"]:
        print_preflight(found)
    found.refuse()
    return None if config["dry_run"] else merge_and_report([run], models, config, found.notes)


def demo(output: Path | None = None) -> Path:
    """The main job on the models that ship with suture: eight experts into one, by every method."""
    from suture.config import compose

    pools = ["modelpool=glyphs8", "taskpool=glyphs8", f"output={output or _new_folder('demo')}"]
    configs = [compose([f"method={name}", *pools]) for name in methods()]
    runs = [Run.from_config(config) for config in configs]
    models = OpenModels(runs[0])
    found = models.preflight()
    found.refuse()
    return merge_and_report(
        runs, models, configs[0] | {"method": [config["method"] for config in configs]}, found.notes
    )


def merge_and_report(
    runs: Sequence[Run], models: "OpenModels", config: Mapping[str, Any], notes: Sequence[str]
) -> Path:
    """Merge by one or several methods, score every result, report. The run's folder appears when all is there."""
    from suture import config as configuration
    from suture.report import Report, print_report, write

    first, profile = runs[0], Profile()
    with new_directory(first.output, overwrite=first.overwrite) as folder:
        merged = {}
        for run in runs:
            with profile("merging weights"):
                place = folder / "model" if len(runs) == 1 else folder / "models" / run.method.name
                merged[run.method.name] = models.merge_into(place, run)
        scores = models.score(merged, profile) if first.taskpool else ([], None, None)
        report = Report(
            f"{', '.join(merged)} of {len(models.models)} models",
            *scores,
            config=config,
            provenance=models.provenance(),
            profile=profile.seconds,
            notes=notes,
            command=shlex.join(["suture", *sys.argv[1:]]),
        )
        write(report, folder)
        configuration.save(dict(config), folder / "config.yaml")
    print_report(report)
    print(f"The merged model and the report are in {first.output}")
    return first.output


class OpenModels:
    """The models of a run, opened; weights are read as they are needed."""

    def __init__(self, run: Run):
        self.run = run
        self.kind = family(run.pool.family)
        self.whole_base = open_checkpoint(run.pool.base, label="_pretrained_")
        self.base = self.mergeable(self.whole_base)
        self.models = {n: self.mergeable(open_checkpoint(m, label=n)) for n, m in run.pool.models.items()}

    def preflight(self) -> Preflight:
        """All that can be said before the slow part."""
        run = self.run
        return preflight(
            self.base,
            self.models,
            run.method,
            run.taskpool,
            frozen=run.frozen,
            mixed_dtypes=run.pool.mixed_dtypes,
            output=run.output,
            bytes_written=sum(spec.nbytes for spec in self.whole_base.specs.values()),
            threads=run.threads,
        )

    def merge_into(self, folder: Path, run: Run) -> dict[str, Tensor]:
        """Write the merged model as its family saves it; returns its merged tensors, memory-mapped from there."""
        folder.mkdir(parents=True)
        stored = self.kind.canonical_names(self.whole_base)
        base = self.whole_base
        with allocate_checkpoint(base.specs, folder / "model.safetensors", aliases=base.aliases) as tensors:
            vectors = TaskVectors(self.base, self.models, run.frozen, run.threads)
            out = {name: tensors[stored[name]] for name in vectors.specs}
            merge_task_vectors(vectors, run.method, run.knobs, out)
            for name in set(tensors) - set(stored.values()):
                tensors[name].copy_(base[name])
        for path in companion_files(self.family.directory):
            (folder / path.name).write_bytes(path.read_bytes())
        return dict(self.mergeable(open_checkpoint(folder)))

    def score(self, merged: Mapping[str, Mapping[str, Tensor]], profile: Profile) -> tuple[list[Row], Row, Row | None]:
        """The rows of the table, then again the pretrained model's and the experts' (None if a task has no expert)."""
        with profile("data loading"):
            inputs = self._inputs()
        with profile("construct the wrapped model"):
            self.encoder.eval()
        with profile("evaluation"):
            pretrained, experts = self._row("pretrained", self.base, inputs), self._experts(inputs)
            rows = [self._row(name, state, inputs) for name, state in merged.items()]
        return [pretrained, *([experts] if experts else []), *rows], pretrained, experts

    def _inputs(self) -> dict[str, TaskInputs]:
        assert self.run.taskpool is not None
        inputs = evaluation_set(self.family, self.run.taskpool.tasks, "test", bar)
        return {name: task.first(self.run.batch_size) for name, task in inputs.items()} if self.run.fast else inputs

    def _experts(self, inputs: Mapping[str, TaskInputs]) -> Row | None:
        if not set(inputs) <= set(self.models):
            return None
        expert = lambda task: self.encoder.load(self.models[task])
        return evaluate_experts(expert, inputs, batch_size=self.run.batch_size, track=bar)

    def _row(self, name: str, state: Mapping[str, Tensor], inputs: Mapping[str, TaskInputs]) -> Row:
        return evaluate_row(name, self.encoder.load(state), inputs, batch_size=self.run.batch_size, track=bar)

    def provenance(self) -> dict[str, Any]:
        """Versions and the sha256 of every file that went in."""
        return provenance({"_pretrained_": self.whole_base, **self.models})

    @cached_property
    def family(self) -> Family:
        """The pretrained model's family: encoder, heads, what is saved beside the weights."""
        if self.whole_base.directory is None:
            raise ConfigError(
                f"'{self.whole_base.label}' is no model directory. Remedy: give one with config and tokenizer."
            )
        return self.kind(self.whole_base.directory, self.whole_base)

    @cached_property
    def encoder(self):
        """One module that every model of the run is loaded into in turn."""
        return self.family.encoder()

    def mergeable(self, checkpoint: Checkpoint) -> Checkpoint:
        """The tensors of a checkpoint that a merge works on, under the family's canonical names."""
        return checkpoint.select(self.kind.canonical_names(checkpoint))


def check_configured(config: Mapping[str, Any]) -> Preflight:
    """The preflight of a run, nothing else."""
    return OpenModels(Run.from_config(config)).preflight()


def evaluate_configured(config: Mapping[str, Any], model: str | None = None) -> list[Row]:
    """Score the pool's pretrained model and experts, and one more model of the same architecture if it is named."""
    from suture.report import Report, print_report

    run = Run.from_config(config)
    if run.taskpool is None:
        raise ConfigError("There is nothing to evaluate on. Remedy: name a taskpool=…")
    models = OpenModels(run)
    models.preflight().refuse()
    named = {Path(model).name: models.mergeable(open_checkpoint(model))} if model else {}
    rows, pretrained, experts = models.score(named, Profile())
    print_report(Report("evaluation", rows, pretrained, experts))
    return rows


def _default_output(config: Mapping[str, Any], method: MergeMethod) -> Path:
    pool = str((config.get("choices") or {}).get("modelpool", "pool")).split("/")[-1]
    return _new_folder(f"{pool}/{method.name}")


def _new_folder(name: str) -> Path:
    return Path("outputs") / name / datetime.now().strftime("%Y%m%d-%H%M%S")
