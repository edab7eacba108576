"""Model directories as `transformers` saves them, with one weight file or with shards and their index."""

import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from suture.checkpoints.checkpoint import Entry
from suture.checkpoints.formats import SUFFIXES, read_entries
from suture.checkpoints.json_files import is_text, read_object
from suture.errors import refusal, shown

INDEX_SUFFIX = ".index.json"
# In the order in which `transformers` looks for them, then those of diffusers.
_USUAL = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.bin",
)
_AGAIN = "copy or download the directory again"
_COMPANIONS = (*SUFFIXES, ".json", ".txt", ".model", ".py", ".jinja", ".tiktoken")
_LONGEST_NAME = 255  # bytes; no file system allows more
_PART = re.compile(r"-\d+-of-0*([2-9]|1\d)")
#: Weights of other libraries, which are named where nothing else is there.
_STRANGERS = (".ggml", ".h5", ".msgpack", ".onnx", ".npz", ".keras", ".tflite")


_PIPELINE = "model_index.json"  # of diffusers: names the folders of a pipeline's components


def is_pipeline(source: object) -> bool:
    """Whether a source is the folder of a whole pipeline of diffusers."""
    try:
        return isinstance(source, str | os.PathLike) and (Path(source) / _PIPELINE).is_file()
    except (OSError, ValueError):  # no permission, a name too long: whoever opens it says so
        return False


def has_weights(directory: Path) -> bool:
    """Whether a directory holds weights, or what names their files."""
    return any(path.suffix in SUFFIXES or path.name.endswith(INDEX_SUFFIX) for path in directory.iterdir())


def weight_file(directory: Path) -> Path:
    """The weight file or index of a model directory; hidden files, such as unfinished results, are not."""
    for name in _USUAL:
        if (directory / name).is_file():
            return directory / name
    if (directory / _PIPELINE).is_file():
        held = next((path for path in sorted(directory.iterdir()) if path.is_dir() and has_weights(path)), "…/unet")
        problem = "is a whole pipeline of diffusers, which only merges of files take, from a folder"
        raise refusal(directory, problem, f"give one of its components, such as '{held}'")
    visible = sorted(path for path in directory.iterdir() if path.is_file() and path.name[0] != ".")
    files = [path for path in visible if path.suffix in SUFFIXES]
    files = files or [path for path in visible if path.suffix == ".gguf"]
    if len(files) == 1 and not _PART.search(files[0].name):
        return files[0]
    strangers = [path.name for path in visible if path.suffix in _STRANGERS]
    if len(files) == 1:
        problem = f"has '{files[0].name}', a part of a model, but no index of the parts,"
        remedy = "wait until all is there, or download it again"
    elif files:
        problem, remedy = f"has several weight files ({', '.join(p.name for p in files[:4])})", "give the file itself"
    elif strangers:
        problem = f"has no weight file that is read, only '{strangers[0]}',"
        remedy = "give the model in safetensors or PyTorch files that this one was converted from"
    else:
        problem, remedy = "has no weight file", "give the file itself"
    raise refusal(directory, f"{problem} and none is called {_USUAL[0]}", remedy)


def check_links(directory: Path) -> None:
    """Refuse a model directory in which a link leads nowhere; such a file would be missed after all the work."""
    for path in sorted(directory.iterdir()):
        if path.suffix in _COMPANIONS and path.is_symlink() and not path.exists():
            problem = f"has the link '{path.name}', which leads to '{os.readlink(path)}', where no file is"
            raise refusal(directory, problem, "copy or download that file, or remove the link")


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
    weight_map = read_object(index, _AGAIN).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(map(_is_file_name, weight_map.values())):
        raise refusal(index, "has a weight_map that does not lead from names to files beside it", _AGAIN)
    if name := next((name for name in weight_map if not is_text(name)), None):
        raise refusal(index, f"has the name {shown(name)!r}, which is not valid Unicode", "rename the tensor")
    return weight_map


def _is_file_name(file: Any) -> bool:
    """Whether a value is the name of a file in the same folder, and nothing that leads elsewhere."""
    if not is_text(file) or file in ("", "..") or "\\" in file or "\0" in file:
        return False
    return PurePath(file).name == file and len(file.encode()) <= _LONGEST_NAME


def _unlisted(index: Path, weight_map: Mapping[str, str], read: Mapping[str, Mapping[str, Entry]]) -> dict[str, Entry]:
    """Tensors of the shards that the index does not list: kept, unless two shards disagree about it."""
    entries: dict[str, Entry] = {}
    for shard in read.values():
        for name in shard.keys() - weight_map.keys():
            if name in entries:
                problem = f"does not say which of two shards holds {shown(name)!r}"
                raise refusal(index, problem, _AGAIN)
            entries[name] = shard[name]
    return entries
