"""Layout of the result: shards of a bounded size, and their index."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from suture.checkpoints import TensorSpec
from suture.checkpoints.directories import INDEX_SUFFIX
from suture.checkpoints.writing import safetensors_header

_NAME = "model"
_DIFFUSERS = "diffusion_pytorch_model"


class Location(NamedTuple):
    """The place of a tensor in the result: its file, its first byte there, its shape and dtype."""

    file: str
    begin: int
    spec: TensorSpec


class Shard(NamedTuple):
    """One file of the result, all of it known before anything is merged."""

    file: str
    header: bytes
    size: int
    locations: Mapping[str, Location]


def file_stem(files: Sequence[Path]) -> str:
    """The name that a library looks for: that of diffusers where the input has it, else model."""
    return _DIFFUSERS if any(file.name.startswith(_DIFFUSERS) for file in files) else _NAME


def split_into_shards(
    specs: Mapping[str, TensorSpec], aliases: Mapping[str, str], shard_size: int, stem: str = _NAME
) -> list[Shard]:
    """The files of a checkpoint, each at most `shard_size` bytes of tensors unless one tensor is larger.

    One file is called model.safetensors; several model-00001-of-0000N.safetensors; `stem` stands for model.
    """
    groups: list[list[str]] = [[]]
    size = 0
    for name in sorted(specs, key=_sort_key):
        if groups[-1] and size + specs[name].nbytes > shard_size:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += specs[name].nbytes
    return [
        _shard(_file_name(stem, i, len(groups)), {name: specs[name] for name in names}, aliases)
        for i, names in enumerate(groups, start=1)
    ]


def _index_text(shards: Sequence[Shard]) -> str:
    """The text of model.safetensors.index.json."""
    locations = {name: location for shard in shards for name, location in shard.locations.items()}
    total = sum(location.spec.nbytes for location in locations.values())
    weight_map = {name: locations[name].file for name in sorted(locations, key=_sort_key)}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"


def write_index(folder: Path, shards: Sequence[Shard], stem: str = _NAME) -> None:
    """Write the index of several shards into a model directory; one file needs none."""
    if len(shards) > 1:
        (folder / f"{stem}.safetensors{INDEX_SUFFIX}").write_text(_index_text(shards), "utf-8")


def _file_name(stem: str, i: int, count: int) -> str:
    return f"{stem}-{i:05d}-of-{count:05d}.safetensors" if count > 1 else f"{stem}.safetensors"


def _shard(file: str, specs: Mapping[str, TensorSpec], aliases: Mapping[str, str]) -> Shard:
    tied = {alias: name for alias, name in aliases.items() if name in specs}
    header, begins = safetensors_header(specs, Path(file), {"format": "pt"}, tied)
    locations = {name: Location(file, begins[name], spec) for name, spec in specs.items()}
    return Shard(file, header, len(header) + sum(spec.nbytes for spec in specs.values()), locations)


def _sort_key(name: str) -> list[tuple[int, str]]:
    """Layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() and len(part) < 20 else (-1, part) for part in name.split(".")]
