"""LoRA adapters as `peft` saves them (https://arxiv.org/abs/2106.09685): a fine-tuned model as base + scale · B·A.

The sums are made tensor by tensor when they are read, so nothing of the base's size is held; and the factors stay
available to whoever can work with them.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from suture.checkpoints.checkpoint import Checkpoint, Entry, Factors
from suture.checkpoints.opening import Source, open_checkpoint
from suture.checkpoints.refusals import refusal, shown
from suture.errors import CheckpointError
from suture.hub import download, is_hub_id

_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight")
Sides = dict[str, dict[str, str]]
_UNKNOWN = ("use_dora", "use_qalora", "lora_bias", "layer_replication", "megatron_config", "corda_config")


def is_adapter(source: Source) -> bool:
    """Whether a source is a folder that holds a LoRA adapter and no whole model."""
    return isinstance(source, str | os.PathLike) and (Path(source) / _CONFIG).is_file()


def open_fine_tuned(source: Source, base: Checkpoint, *, label: str | None = None) -> Checkpoint:
    """A fine-tuned model: whatever `open_checkpoint` takes, or a LoRA adapter, which is opened on its base.

    Raises `CheckpointError`, also for an adapter that fits nothing in the base or that is of a kind other than LoRA.
    """
    try:
        if isinstance(source, str) and is_hub_id(source):
            label, source = label or source, download(source)
        if not is_adapter(source):
            return open_checkpoint(source, label=label)
        return _open_adapter(Path(str(source)), base, label or str(source))
    except CheckpointError as error:
        raise CheckpointError(f"'{shown(label)}': {error}" if label else str(error)) from error


def _open_adapter(folder: Path, base: Checkpoint, label: str) -> Checkpoint:
    config = _configuration(folder / _CONFIG)
    file = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise refusal(folder, f"has no {_WEIGHTS[0]}", "copy or download the adapter again")
    weights = open_checkpoint(file)
    sides, replaced = _sorted_out(weights, base, folder)
    entries = {name: _untouched(base, name) for name in base}
    for module, found in sides.items():
        entries[f"{module}.weight"] = _adapted(base, module, found, weights, config, folder)
    for name, stored in replaced.items():
        entries[name] = Entry(weights.specs[stored], lambda stored=stored: weights[stored])
    return Checkpoint(entries, label, files=(file,), directory=None)


def _configuration(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise refusal(path, f"cannot be read ({type(error).__name__})", "copy or download the adapter again") from error
    if config.get("peft_type") != "LORA":
        raise refusal(path, f"describes an adapter of type {config.get('peft_type')!r}", "merge it into its base first")
    for key in _UNKNOWN:
        if config.get(key):
            raise refusal(path, f"asks for {key}, which is not plain LoRA", "merge it into its base first")
    return config


def _sorted_out(weights: Checkpoint, base: Checkpoint, folder: Path) -> tuple[Sides, dict[str, str]]:
    """Module → side → stored name of each factor; and name in the base → stored name of what is replaced whole."""
    sides: Sides = {}
    replaced: dict[str, str] = {}
    for stored in weights:
        match = _FACTOR.fullmatch(stored.removeprefix(_PREFIX))
        if match is None:
            replaced[re.sub(r"\.(modules_to_save|base_layer)\b", "", stored.removeprefix(_PREFIX))] = stored
        else:
            sides.setdefault(match["module"], {})[match["side"]] = stored
    for name in [*(f"{module}.weight" for module in sides), *replaced]:
        if name not in base:
            raise refusal(folder, f"adapts '{shown(name)}', which the base lacks", "give the base it was trained on")
    if not sides and not replaced:
        raise refusal(folder, "holds no weights", "copy or download the adapter again")
    return sides, replaced


def _adapted(
    base: Checkpoint,
    module: str,
    found: Mapping[str, str],
    weights: Checkpoint,
    config: Mapping[str, Any],
    folder: Path,
) -> Entry:
    name = f"{module}.weight"
    if set(found) != {"A", "B"}:
        raise refusal(folder, f"has only one of the two factors of '{shown(name)}'", "copy the adapter again")
    spec, scale = base.specs[name], _scale(config, module)
    up, down = weights.specs[found["B"]], weights.specs[found["A"]]
    rows, columns = up.shape[0], math.prod(down.shape[1:])
    turned = bool(config.get("fan_in_fan_out"))
    wanted = (columns, rows) if turned else (rows, columns)
    if up.shape[1] != down.shape[0] or wanted != (spec.shape[0], math.prod(spec.shape[1:])):
        problem = f"has factors of shapes {up.shape} and {down.shape} for '{shown(name)}' of shape {spec.shape}"
        raise refusal(folder, problem, "give the base it was trained on")

    def factors() -> Factors:
        left, right = weights[found["B"]].flatten(1).float() * scale, weights[found["A"]].flatten(1).float()
        return Factors(right.T, left.T) if turned else Factors(left, right)

    def read() -> Tensor:
        left, right = factors()
        tensor = base[name]
        return (tensor.float() + (left @ right).view(tensor.shape)).to(tensor.dtype)

    return Entry(spec, read, None, factors)


def _untouched(base: Checkpoint, name: str) -> Entry:
    shape = base.specs[name].shape
    rows = shape[0] if shape else 1
    columns = base.specs[name].numel // max(1, rows)
    identity = (id(base), base.aliases.get(name, name)) if name in {*base.aliases, *base.aliases.values()} else None
    return Entry(base.specs[name], lambda: base[name], identity, lambda: Factors.none(rows, columns))


def _scale(config: Mapping[str, Any], module: str) -> float:
    """lora_alpha / r, or / √r with rank stabilisation; both may have a pattern of their own for some modules."""
    rank = _patterned(config.get("rank_pattern"), module, config["r"])
    alpha = _patterned(config.get("alpha_pattern"), module, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _patterned(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default
