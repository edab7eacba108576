"""The public calls: merge files, plan a merge, merge what a mergekit file describes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from suture.checkpoints import Source
from suture.errors import ConfigError, shown
from suture.file_merge.job import Job
from suture.file_merge.mask_methods import MASK_METHODS
from suture.file_merge.mergekit.translation import translate
from suture.file_merge.mergekit.yaml_file import load_yaml
from suture.file_merge.options import MergeOptions, read_options
from suture.file_merge.plan import Plan, make_plan
from suture.file_merge.tensor_knobs import UNSET
from suture.merging.registry import methods
from suture.merging.wrapping import After
from suture.pipeline.methods import find_method


def _name(document: Mapping[str, Any], number: int) -> str:
    """The folder of one of several merges; refuses a name that leads elsewhere."""
    name = str(document.get("name") or number)
    if Path(name).name != name or name in ("", "..", ".") or "\\" in name:
        raise ConfigError(f"name: '{shown(name)}' is no name of a folder. Remedy: give one without slashes.")
    return name


def _with_results(content: Any, made: Mapping[str, str]) -> Any:
    """A document in which the names of earlier ones are the paths of their results."""
    if isinstance(content, list):
        return [_with_results(each, made) for each in content]
    if not isinstance(content, Mapping):
        return content
    return {
        key: made.get(value, value)
        if key in ("model", "base_model", "path") and isinstance(value, str)
        else _with_results(value, made)
        for key, value in content.items()
    }


@dataclass(frozen=True)
class ConfiguredMerge:
    """The result of a configured merge.

    `finished` says whether the result is in `output`; it is not where only a plan was asked for, or where other shares
    are still to be done. `notes` say what differs from mergekit.
    """

    output: Path
    part: tuple[int, int]
    finished: bool
    notes: Sequence[str] = ()
    plan: Plan | None = None

    def __str__(self) -> str:
        if self.plan is not None:
            return str(self.plan)
        if self.finished:
            return f"The merged model is in {self.output}"
        return f"Share {self.part[0]}/{self.part[1]} of {self.output} is done; others are not."


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
    after: After = None,
    space: str | None = None,
    frozen: Sequence[str] = (),
    keep: Sequence[str] = (),
    only: Sequence[str] = (),
    key: str | None = None,
    encode: str | None = None,
    **knobs: Any,
) -> Path:
    """Merge checkpoints into a model directory that `transformers` loads; returns its path.

    `base` and `models` are whatever `open_checkpoint` takes, addresses such as s3://… included, or adapters' folders;
    `base` may be None for methods without task vectors, and where all models are adapters: these make one adapter,
    exactly or cut to `rank`, by a linear method or by any method in a shared `space` (core, knots, dc, dc_linear).
    `knobs` are the method's own; each may be a value, a gradient over the layers (a list of numbers) or a list of
    `{"filter": part of a tensor's name, "value": …}`. `after` names wrappers, as in `merge`. Arithmetic is in float32,
    in float64 for float64 tensors.

    Names or patterns choose tensors: those of `frozen` and `keep` stay at the base, whatever the models have there or
    lack; with `only`, all others do. `key` chooses one of several models in a PyTorch file, such as params_ema.

    `encode="input"` writes the tensors that the base holds as codes (FP8, MXFP4, int8, nf4) in such codes again; the
    error that this adds is in suture_merge.json.

    `dtype` is that of the result (by default the base's), `shard_size` the most that one file holds, `memory` the most
    that the merge holds beside what the system caches of files, whatever the size of the models, and `device` is where
    slices are merged: cpu, cuda or cuda:N. `shard="i/n"` does the i-th of n shares; the process that finds all shares
    done publishes the result, after every tensor was read back. A merge that was killed resumes with bit-identical
    results when it is called again. An `output` at an address (s3://…) is made in suture's cache, then sent, so that it
    is visible when it is whole. Raises `SutureError` in one line for whatever does not fit.

    >>> import tempfile, torch
    >>> out = Path(tempfile.mkdtemp()) / "merged"
    >>> base, tuned = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    >>> path = merge_files(base, {"one": tuned}, "task_arithmetic", out, scaling_factor=0.5)
    >>> sorted(file.name for file in path.iterdir())
    ['README.md', 'model.safetensors', 'suture_merge.json']
    """
    options = read_options(
        base,
        models,
        method,
        output,
        knobs=knobs,
        dtype=dtype,
        shard_size=shard_size,
        memory=memory,
        threads=threads,
        device=device,
        shard=shard,
        vocabulary=vocabulary,
        allow_non_finite=allow_non_finite,
        mixed_dtypes=mixed_dtypes,
        overwrite=overwrite,
        rank=rank,
        after=after,
        space=space,
        frozen=frozen,
        keep=keep,
        only=only,
        key=key,
        encode=encode,
    )
    Job(options).run()
    return _place(options)


def plan_files(
    base: Source | None,
    models: Mapping[str, Source] | Sequence[Source],
    method: str,
    output: str | Path,
    **options: Any,
) -> Plan:
    """The bytes that `merge_files` with the same arguments would read, write and hold, and its time here.

    Disk and method are measured for a moment; a probe is written beside the output and removed.
    """
    names = {field.name for field in fields(MergeOptions)} | {"shard", "frozen", "keep", "only"}
    own = {key: value for key, value in options.items() if key in names}
    knobs = {key: value for key, value in options.items() if key not in names}
    return make_plan(Job(read_options(base, models, method, output, knobs=knobs, **own)))


def merge_mergekit(config: str | Path, output: str | Path, **options: Any) -> Path:
    """Merge what a mergekit YAML file describes; `options` are those of `merge_files` but for models and method.

    Several documents are several merges, each into a folder of `output` under its `name:` (or its number), in their
    order; a later one may name an earlier one as its model.
    """
    documents = load_yaml(Path(config))
    for number in range(1, len(documents) + 1):
        Job(_translated(config, {"output": output, **options}, documents, number)).run()
    return Path(output)


def merge_configured(config: Mapping[str, Any]) -> ConfiguredMerge:
    """One merge, or its plan, from the configuration of a command line; or those of a mergekit file's documents."""
    documents = load_yaml(Path(config["mergekit"])) if config["mergekit"] else []
    if len(documents) < 2:
        return _merge_one(config, _configured(config))
    if config["plan"]:
        raise ConfigError(f"'{config['mergekit']}' holds {len(documents)} merges. Remedy: plan one at a time.")
    merges = [_merge_one(config, _configured(config, documents, i)) for i in range(1, len(documents) + 1)]
    notes = tuple(dict.fromkeys(note for merge in merges for note in merge.notes))
    finished = all(merge.finished for merge in merges)
    return ConfiguredMerge(Path(config["output"]), merges[0].part, finished, notes)


def _merge_one(config: Mapping[str, Any], options: MergeOptions) -> ConfiguredMerge:
    job = Job(options)
    plan = make_plan(job) if config["plan"] else None
    finished = plan is None and job.run()
    notes = options.translation.notes if options.translation else ()
    read = () if options.adapters else job.inputs.notes
    return ConfiguredMerge(_place(options), options.part, finished, (*notes, *read, *job.notes), plan)


def _place(options: MergeOptions) -> Any:
    """The path or the address of the result."""
    return options.output if options.destination is None else options.destination.address


def _configured(
    config: Mapping[str, Any], documents: Sequence[Mapping[str, Any]] = (), number: int = 1
) -> MergeOptions:
    arguments = {key: value for key, value in config.items() if key not in ("mergekit", "method", "plan", "seed")}
    if not arguments["output"]:
        raise ConfigError("Missing argument: output=…, the folder for the merged model.")
    if config["mergekit"]:
        if arguments.pop("base") or arguments.pop("models") or config.get("method"):
            raise ConfigError("mergekit=… names base, models and method itself. Remedy: leave those arguments out.")
        return _translated(config["mergekit"], arguments, documents, number)
    method = config.get("method")
    if not isinstance(method, Mapping) or not method.get("name"):
        raise ConfigError(f"Missing argument: method=…. Known: {', '.join([*methods(), *MASK_METHODS])}.")
    knobs = {key: value for key, value in method.items() if key not in ("name", "after")}
    if (masks := MASK_METHODS.get(method["name"])) is not None:  # knobs of a run, which composed their defaults
        unused = find_method(masks.name).knobs.defaults
        knobs = {k: v for k, v in knobs.items() if k in masks.knobs.defaults or unused.get(k, UNSET) != v}
    return read_options(method=method["name"], knobs=knobs, after=method.get("after"), **arguments)


def _translated(
    config: str | Path, arguments: Mapping[str, Any], documents: Sequence[Mapping[str, Any]] = (), number: int = 1
) -> MergeOptions:
    """The options of a mergekit file, or of one of its documents; arguments beside it go before what the file says."""
    several = len(documents) > 1
    if several:
        folders = [Path(arguments["output"]) / _name(each, i) for i, each in enumerate(documents, start=1)]
        made = {folder.name: str(folder) for folder in folders[: number - 1]}
        arguments = {**arguments, "output": folders[number - 1]}
    file = translate(config, _with_results(documents[number - 1], made) if several else None)
    given = {key: value for key, value in arguments.items() if value is not None}
    dtype = None if given.get("encode") else file.dtype
    given |= {"dtype": given.get("dtype") or dtype, "mixed_dtypes": True}
    given |= {"vocabulary": file.vocabulary if given.get("vocabulary", "refuse") == "refuse" else given["vocabulary"]}
    return read_options(file.base, file.models, file.method, knobs={}, translation=file, **given)
