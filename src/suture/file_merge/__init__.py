"""Merge files of any size: sharded checkpoints in, a sharded checkpoint out, in bounded memory, at the disk's speed."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from suture.checkpoints import Source
from suture.errors import ConfigError
from suture.file_merge.job import Job
from suture.file_merge.mergekit.translation import read
from suture.file_merge.options import Recipe
from suture.file_merge.plan import Plan, plan
from suture.merging.registry import methods

__all__ = ["merge_configured", "merge_files", "merge_mergekit", "plan_files"]


def merge_files(
    base: Source | None,
    models: Mapping[str, Source] | Sequence[Source],
    method: str,
    output: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    shard_size: int | str = "5GB",
    memory: int | str = "300MB",
    threads: int = 0,
    device: str = "cpu",
    shard: str | None = None,
    vocabulary: str = "refuse",
    allow_non_finite: Sequence[str] = (),
    mixed_dtypes: bool = False,
    overwrite: bool = False,
    rank: int | None = None,
    **knobs: Any,
) -> Path:
    """Merge checkpoints into a model directory that `transformers` loads; returns its path.

    `base` and `models` are whatever `open_checkpoint` takes, or LoRA adapters' folders; `base` may be None for methods
    without task vectors, and where all models are adapters: these make one adapter, exactly or cut to `rank`. `knobs`
    are the method's own; each may be a value, a gradient over the layers (a list of numbers) or a list of
    `{"filter": part of a tensor's name, "value": …}`. Arithmetic is in float32.

    `dtype` is that of the result (by default the base's), `shard_size` the most that one file holds, `memory` what the
    merge may hold beside what the system caches of files, whatever the size of the models, `device` where slices are
    merged: cpu, cuda or cuda:N. `shard="i/n"` does the i-th
    of n shares; the process that finds all shares done makes the result appear. What is killed goes on where it stopped
    when it is called again, to the same bytes. Raises `SutureError` in one line for whatever does not fit.

    >>> import tempfile, torch
    >>> out = Path(tempfile.mkdtemp()) / "merged"
    >>> base, tuned = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    >>> path = merge_files(base, {"one": tuned}, "task_arithmetic", out, scaling_factor=0.5)
    >>> sorted(file.name for file in path.iterdir())
    ['README.md', 'model.safetensors', 'suture_merge.json']
    """
    told = {
        "dtype": dtype,
        "shard_size": shard_size,
        "memory": memory,
        "threads": threads,
        "device": device,
        "shard": shard,
        "rank": rank,
    }
    told |= {"vocabulary": vocabulary, "allow_non_finite": allow_non_finite, "mixed_dtypes": mixed_dtypes}
    recipe = Recipe.of(base, models, method, output, settings=knobs, overwrite=overwrite, **told)
    Job(recipe).run()
    return recipe.output


def plan_files(
    base: Source | None,
    models: Mapping[str, Source] | Sequence[Source],
    method: str,
    output: str | Path,
    **options: Any,
) -> Plan:
    """What `merge_files` with the same arguments would read, write and hold, and how long it would take here.

    Disk and method are measured for a moment; a probe is written beside the output and removed.
    """
    names = {field.name for field in fields(Recipe)} | {"shard"}
    told = {key: value for key, value in options.items() if key in names}
    knobs = {key: value for key, value in options.items() if key not in names}
    recipe = Recipe.of(base, models, method, output, settings=knobs, **told)
    return plan(Job(recipe))


def merge_mergekit(config: str | Path, output: str | Path, **options: Any) -> Path:
    """Merge what a mergekit YAML file describes; `options` are those of `merge_files` but for models and method."""
    Job(recipe := _translated(config, {"output": output, **options})).run()
    return recipe.output


def merge_configured(config: Mapping[str, Any]) -> Plan | Path:
    """One merge, or its plan, from the words of a command line, which is told how it went."""
    job = Job(_recipe(config))
    for note in job.recipe.translation.notes if job.recipe.translation else ():
        print(f"note: {note}")
    if config["plan"]:
        planned = plan(job)
        print(planned)
        return planned
    output, (i, n) = job.recipe.output, job.recipe.part
    print(f"The merged model is in {output}" if job.run() else f"Share {i}/{n} of {output} is done; others are not.")
    return output


def _recipe(config: Mapping[str, Any]) -> Recipe:
    told = {key: value for key, value in config.items() if key not in ("mergekit", "method", "plan", "seed")}
    if not told["output"]:
        raise ConfigError("There is no output=… among the words. Remedy: name the folder for the merged model.")
    if config["mergekit"]:
        if told.pop("base") or told.pop("models") or config.get("method"):
            raise ConfigError("mergekit=… names base, models and method itself. Remedy: leave those words out.")
        return _translated(config["mergekit"], told)
    if not config.get("method"):
        raise ConfigError(f"There is no method=… among the words. Known: {', '.join(methods())}.")
    method = dict(config["method"])
    return Recipe.of(method=method.pop("name"), settings=method, **told)


def _translated(config: str | Path, told: Mapping[str, Any]) -> Recipe:
    """The recipe of a mergekit file; what is told beside it goes before what the file says."""
    found = read(config)
    given = {key: value for key, value in told.items() if value is not None}
    given |= {"dtype": given.get("dtype") or found.dtype, "mixed_dtypes": True}
    given |= {"vocabulary": found.vocabulary if given.get("vocabulary", "refuse") == "refuse" else given["vocabulary"]}
    return Recipe.of(found.base, found.models, found.method, settings={}, translation=found, **given)
