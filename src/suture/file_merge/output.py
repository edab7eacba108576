"""The files beside the merged weights: configuration, tokenizer, model card, and provenance."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from suture.checkpoints import TensorSpec
from suture.checkpoints.provenance import PROVENANCE
from suture.errors import PRETRAINED
from suture.file_merge.inputs import Inputs
from suture.file_merge.mergekit.chat_template import write_template
from suture.file_merge.options import MergeOptions
from suture.pipeline.card_parts import command_line, front_matter, inputs_table
from suture.storage.remote import RemotePath

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


def write_companions(
    folder: Path, options: MergeOptions, inputs: Inputs, specs: Mapping[str, TensorSpec], work: Mapping[str, Any]
) -> None:
    """Everything of a model directory but weights and index."""
    for path in companions(inputs.directory):
        if isinstance(path, RemotePath):
            (folder / path.name).write_bytes(path.read_bytes())
        else:
            shutil.copyfile(path, folder / path.name)
    if inputs.config is not None:
        sliced = options.translation.config(inputs.config) if options.translation else {}
        (folder / "config.json").write_text(_config_text({**inputs.config, **sliced}, specs), "utf-8")
    if inputs.tokenizer is not None:
        (folder / "tokenizer.json").write_text(inputs.tokenizer, "utf-8")
    if options.translation and options.translation.chat_template:
        write_template(folder, options.translation.chat_template)
    origin = {**inputs.provenance(), "command": options.command, "work": work}
    (folder / PROVENANCE).write_text(json.dumps(origin, indent=2) + "\n", "utf-8")
    (folder / "README.md").write_text(_card(options, inputs, origin), "utf-8")


def companions(directory: Path | None) -> list[Path]:
    """The files of a model directory that go with its weights."""
    if directory is None:
        return []
    return sorted({path for pattern in _COMPANIONS for path in directory.glob(pattern) if path.is_file()})


def _config_text(config: dict[str, Any], specs: Mapping[str, TensorSpec]) -> str:
    """The configuration with the dtype of the weights, under every key that it had."""
    dtypes = [spec.dtype for spec in specs.values() if spec.dtype.is_floating_point]
    if dtypes and "_class_name" not in config:  # diffusers knows no dtype there
        name = str(max(set(dtypes), key=dtypes.count)).removeprefix("torch.")
        keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
        config = config | dict.fromkeys(keys, name)
    return json.dumps(config, indent=2) + "\n"


def _card(options: MergeOptions, inputs: Inputs, origin: Mapping[str, Any]) -> str:
    """The model card, with the tags that hubs look for."""
    sources = {PRETRAINED: options.base, **options.models}
    file = options.translation
    knobs = (file.content.get("parameters") or {}) if file else options.knobs
    settings = "".join(f" {key}={value}" for key, value in knobs.items())
    settings += "".join(f", then [{wrapper.name}]({wrapper.paper})" for wrapper, _ in options.after)
    dtype = str(options.dtype).removeprefix("torch.") if options.dtype else "that of the base"
    lines = [
        *front_matter(list(sources.values()), [options.method.name], "transformers"),
        f"# {(file and file.name) or options.output.name}",
        "",
        f"Merged by [{options.method.name}]({options.method.paper}){settings} with suture "
        f"{origin['versions']['suture']}; dtype {dtype}.",
        "",
        *inputs_table(sources, origin["inputs"]),
        "",
        *([command_line(origin["command"]), ""] if origin["command"] else []),
    ]
    return "\n".join(lines)
