"""Model directories as `transformers` saves them, with one weight file or with shards and their index."""

import json
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from suture.checkpoints.checkpoint import Entry
from suture.checkpoints.formats import SUFFIXES, read_entries
from suture.errors import refusal, shown

INDEX_SUFFIX = ".index.json"
# In the order in which `transformers` looks for them.
_USUAL = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_AGAIN = "copy or download the directory again"


def weight_file(directory: Path) -> Path:
    """The weight file or index of a model directory; hidden files, such as unfinished results, are not."""
    for name in _USUAL:
        if (directory / name).is_file():
            return directory / name
    found = sorted(p for p in directory.iterdir() if p.suffix in SUFFIXES and p.is_file() and p.name[0] != ".")
    if len(found) == 1:
        return found[0]
    problem = f"has several weight files ({', '.join(p.name for p in found[:4])})" if found else "has no weight file"
    raise refusal(directory, f"{problem} and none is called {_USUAL[0]}", "give the file itself")


def read_sharded(index: Path) -> tuple[dict[str, Entry], tuple[Path, ...]]:
    """The entries of all shards that an index names, and their files; `CheckpointError` if one is missing."""
    weight_map = _weight_map(index)
    shards = {file: index.parent / file for file in sorted(set(weight_map.values()))}
    missing = [file for file, path in shards.items() if not path.is_file()]
    if missing:
        problem = f"lacks {len(missing)} of its {len(shards)} shards, the first is '{missing[0]}'"
        raise refusal(index.parent, problem, _AGAIN)
    read = {file: read_entries(path)[0] for file, path in shards.items()}
    entries = _unlisted(index, weight_map, read)
    for name, file in weight_map.items():
        if name not in read[file]:
            raise refusal(shards[file], f"lacks {shown(name)!r}, which '{index.name}' says it holds", _AGAIN)
        entries[name] = read[file][name]
    return entries, tuple(shards.values())


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found: Any = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise refusal(index, f"is no index of shards ({type(error).__name__}: {error})", _AGAIN) from error
    if not isinstance(found, dict) or not found or not all(_file_name(file) for file in found.values()):
        raise refusal(index, "has a weight_map that does not lead from names to files beside it", _AGAIN)
    return found


def _file_name(file: Any) -> bool:
    return isinstance(file, str) and file not in ("", "..") and PurePath(file).name == file and "\\" not in file


def _unlisted(index: Path, weight_map: Mapping[str, str], read: Mapping[str, Mapping[str, Entry]]) -> dict[str, Entry]:
    """What the shards hold beyond the index: kept, unless two shards disagree about it."""
    entries: dict[str, Entry] = {}
    for shard in read.values():
        for name in shard.keys() - weight_map.keys():
            if name in entries:
                problem = f"does not say which of two shards holds {shown(name)!r}"
                raise refusal(index, problem, _AGAIN)
            entries[name] = shard[name]
    return entries
