"""What goes beside the merged weights: configuration, tokenizer, model card, and where everything came from."""

import json
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from suture.checkpoints import TensorSpec
from suture.checkpoints.provenance import PROVENANCE
from suture.file_merge.chat import write_template
from suture.file_merge.inputs import BASE, Inputs
from suture.file_merge.options import Recipe
from suture.pipeline.card_parts import command_line, front_matter, inputs_table
from suture.storage.atomic import check_replaceable

_COMPANIONS = (
    "added_tokens.json",
    "chat_template*",
    "config.json",
    "generation_config.json",
    "LICENSE*",
    "merges.txt",
    "*.model",
    "NOTICE*",
    "preprocessor_config.json",
    "processor_config.json",
    "*.py",
    "special_tokens_map.json",
    "*.tiktoken",
    "tokenizer*.json",
    "vocab.*",
)


def already_there(recipe: Recipe, work: Mapping[str, Any]) -> bool:
    """Whether the output is the result of this very merge; `OutputError` if it is something else."""
    try:
        found = json.loads((recipe.output / PROVENANCE).read_text("utf-8"))["work"]
    except (OSError, ValueError, KeyError, TypeError):
        found = None
    if found == json.loads(json.dumps(work)):
        return True
    check_replaceable(recipe.output, recipe.overwrite)
    return False


def write_companions(
    folder: Path, recipe: Recipe, inputs: Inputs, specs: Mapping[str, TensorSpec], work: Mapping[str, Any]
) -> None:
    """Everything of a model directory but weights and index."""
    for path in companions(inputs.directory):
        shutil.copyfile(path, folder / path.name)
    config = folder / "config.json"
    if config.exists():
        found = json.loads(config.read_text("utf-8"))
        sliced = recipe.translation.config(found) if recipe.translation else {}
        config.write_text(_configured({**found, **inputs.config, **sliced}, specs), "utf-8")
    if inputs.tokenizer is not None:
        (folder / "tokenizer.json").write_text(inputs.tokenizer, "utf-8")
    if recipe.translation and recipe.translation.chat_template:
        write_template(folder, recipe.translation.chat_template)
    origin = {**inputs.provenance(), "command": shlex.join(["suture", *sys.argv[1:]]), "work": work}
    (folder / PROVENANCE).write_text(json.dumps(origin, indent=2) + "\n", "utf-8")
    (folder / "README.md").write_text(_card(recipe, inputs, origin), "utf-8")


def companions(directory: Path | None) -> list[Path]:
    """The files of a model directory that go with its weights."""
    if directory is None:
        return []
    found = {path for pattern in _COMPANIONS for path in directory.glob(pattern) if path.is_file()}
    return sorted(found)


def _configured(config: dict[str, Any], specs: Mapping[str, TensorSpec]) -> str:
    """The configuration with the dtype of the weights, in all the places where it was told."""
    dtypes = [spec.dtype for spec in specs.values() if spec.dtype.is_floating_point]
    if dtypes:
        name = str(max(set(dtypes), key=dtypes.count)).removeprefix("torch.")
        keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
        config = config | dict.fromkeys(keys, name)
    return json.dumps(config, indent=2) + "\n"


def _card(recipe: Recipe, inputs: Inputs, origin: Mapping[str, Any]) -> str:
    """The model card, with the tags that hubs look for."""
    sources = {BASE: recipe.base, **recipe.models}
    told = recipe.translation.told.get("parameters") or {} if recipe.translation else recipe.settings
    settings = "".join(f" {key}={value}" for key, value in told.items())
    lines = [
        *front_matter(list(sources.values()), [recipe.method.name], "transformers"),
        f"# {recipe.output.name}",
        "",
        f"Merged by [{recipe.method.name}]({recipe.method.paper}){settings} with suture "
        f"{origin['versions']['suture']}; dtype {_told(recipe.dtype)}.",
        "",
        *inputs_table(sources, origin["inputs"]),
        "",
        command_line(origin["command"]),
        "",
    ]
    return "\n".join(lines)


def _told(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.") if dtype else "that of the base"
