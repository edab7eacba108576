"""Whole pipelines of diffusers: every component that holds weights is merged, the rest is the base's.

A pipeline is a folder with a model_index.json and a folder for each component. The components are merged one after
another, each as any model directory is, beside the output; the pipeline appears there when it is whole.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from suture import __version__
from suture.checkpoints.directories import has_weights, is_pipeline
from suture.checkpoints.formats import SUFFIXES
from suture.checkpoints.provenance import PROVENANCE
from suture.errors import ConfigError, IncompatibleModels, shown
from suture.file_merge.job import Job
from suture.file_merge.options import MergeOptions
from suture.file_merge.workspace import recorded_work
from suture.merging.selection import Selection
from suture.pipeline.card_parts import front_matter
from suture.storage.atomic import check_replaceable, disk_errors, put_in_place, sync_tree


def of_pipelines(options: MergeOptions) -> bool:
    """Whether base and models are whole pipelines; `IncompatibleModels` where only some are."""
    sources = {"base": options.base, **options.models}
    whole = {label: is_pipeline(source) for label, source in sources.items()}
    if not any(whole.values()):
        return False
    if other := next((label for label, pipeline in whole.items() if not pipeline), None):
        pipeline = next(label for label in whole if whole[label])
        problem = f"'{pipeline}' is a whole pipeline of diffusers and '{other}' is none"
        raise IncompatibleModels(f"{problem}. Remedy: give the same component of each, such as {pipeline}/unet.")
    return True


@dataclass
class PipelineJob:
    """One merge of pipelines: its options, and notes on what was read."""

    options: MergeOptions
    notes: list[str] = field(default_factory=list)

    @cached_property
    def merged(self) -> list[str]:
        """The components that are merged: those of the base with weights that frozen, keep and only leave."""
        base, selection = Path(str(self.options.base)), self.options.selection
        weighty = sorted(path.name for path in base.iterdir() if path.is_dir() and has_weights(path))
        for key in ("frozen", "keep", "only"):
            for pattern in getattr(selection, key):
                if not any(fnmatchcase(name, pattern) for name in weighty):
                    problem = f"{key}: '{shown(pattern)}' is the name of no component with weights"
                    raise ConfigError(f"{problem}. Remedy: name some of {', '.join(weighty)}.")
        stays = (*selection.frozen, *selection.keep)
        chosen = [name for name in weighty if not _fits(name, stays) and _fits(name, selection.only or ("*",))]
        if not chosen:
            raise ConfigError(f"'{base}' has no component to merge. Remedy: leave out fewer components.")
        return chosen

    @cached_property
    def staging(self) -> Path:
        """The folder in which the pipeline is made."""
        output = self.options.output.absolute()
        return output.with_name(f".{output.name}.pipeline")

    @cached_property
    def jobs(self) -> dict[str, Job]:
        """The merge of every component."""
        options = self.options
        sources = {label: Path(str(source)) for label, source in options.models.items()}
        for label, source in sources.items():
            if lacking := next((name for name in self.merged if not (source / name).is_dir()), None):
                remedy = f"keep=[{lacking}] leaves it at the base"
                raise IncompatibleModels(
                    f"'{label}' has no component '{lacking}', which the base has. Remedy: {remedy}."
                )
        return {
            name: Job(
                replace(
                    options,
                    base=Path(str(options.base)) / name,
                    models={label: source / name for label, source in sources.items()},
                    output=self.staging / name,
                    selection=Selection(),
                    overwrite=True,
                )
            )
            for name in self.merged
        }

    def run(self) -> bool:
        """Merge all components, and publish; True. A merge that was killed goes on where it was."""
        self._check()
        work = json.loads(json.dumps({name: job.inputs.work(job.options) for name, job in self.jobs.items()}))
        self.notes += [f"{name}: {note}" for name, job in self.jobs.items() for note in job.inputs.notes]
        output = self.options.output
        if recorded_work(output) == work:
            return True
        inputs = [Path(str(source)) for source in (self.options.base, *self.options.models.values())]
        check_replaceable(output, self.options.overwrite, inputs=inputs)
        for name, job in self.jobs.items():
            job.run()
            self.notes += [f"{name}: {note}" for note in job.notes]
        with disk_errors(output, "free some space; the same command goes on where it stopped"):
            self._copy_rest(work)
            sync_tree(self.staging)
            check_replaceable(output, self.options.overwrite, inputs=inputs)
            put_in_place(self.staging, output.absolute())
        return True

    def _check(self) -> None:
        """Refuse what only a merge of one component can do."""
        options = self.options
        for key, given in (
            ("output=ADDRESS", options.destination is not None),
            ("shard", options.part != (1, 1)),
            ("key", options.key is not None),
            (f"method={options.method.name}", options.masks),
        ):
            if given:
                component = f"{options.base}/{self.merged[0]}"
                raise ConfigError(f"{key} is not for whole pipelines. Remedy: merge one component, base={component}.")

    def _copy_rest(self, work: Mapping[str, Any]) -> None:
        """Copy what is not merged, and record what was; weights beside the components, one file for all, are not."""
        base = Path(str(self.options.base))
        for path in sorted(base.iterdir()):
            target = self.staging / path.name
            if path.name in self.jobs or path.name.startswith("."):
                continue
            if path.is_dir():
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(path, target)
            elif path.suffix not in SUFFIXES and path.name != "README.md":
                shutil.copyfile(path, target)
        origins = {name: job.inputs.provenance() for name, job in self.jobs.items()}
        record = {**next(iter(origins.values())), "inputs": {name: each["inputs"] for name, each in origins.items()}}
        record |= {"command": self.options.command, "work": work}
        (self.staging / PROVENANCE).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
        (self.staging / "README.md").write_text(self._card(), "utf-8")

    def _card(self) -> str:
        """The model card; every merged component has one of its own, with knobs and hashes."""
        options = self.options
        sources = [str(source) for source in (options.base, *options.models.values())]
        lines = [
            *front_matter(sources, [options.method.name], "diffusers"),
            f"# {options.output.name}",
            "",
            f"A pipeline of {', '.join(sources)}. Merged by [{options.method.name}]({options.method.paper}) with "
            f"suture {__version__}: {', '.join(self.jobs)}. Everything else is that of {sources[0]}.",
            "",
        ]
        return "\n".join(lines)


def _fits(name: str, patterns: Any) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
