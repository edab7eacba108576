"""LoRA adapters as `peft` saves them (https://arxiv.org/abs/2106.09685): a fine-tuned model as base + scale · B·A.

The sums are made when they are read, tensor by tensor or slice by slice, so nothing of the base's size is held; and the
factors stay available to whoever can work with them.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from suture.checkpoints.checkpoint import Checkpoint, Entry, Factors
from suture.checkpoints.opening import Source, open_checkpoint
from suture.errors import CheckpointError, refusal, shown
from suture.storage.hub import download, is_hub_id

_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight")
Sides = dict[str, dict[str, str]]
Naming = Callable[[Iterable[str]], Mapping[str, str]]
_BLOCK = 1 << 16  # entries of B·A that are made at once
_UNKNOWN = ("use_dora", "use_qalora", "lora_bias", "layer_replication", "megatron_config", "corda_config")


def is_adapter(source: Source) -> bool:
    """Whether a source is a folder that holds a LoRA adapter and no whole model."""
    return isinstance(source, str | os.PathLike) and (Path(source) / _CONFIG).is_file()


def open_fine_tuned(
    source: Source, base: Checkpoint, *, label: str | None = None, canonical_names: Naming | None = None
) -> Checkpoint:
    """A fine-tuned model: whatever `open_checkpoint` takes, or a LoRA adapter, which is opened on its base.

    `canonical_names(names)` maps the base's names to those of an adapter that calls its tensors otherwise. Raises
    `CheckpointError`, also for an adapter that fits nothing in the base or that is of a kind other than LoRA.
    """
    if not (is_adapter(source) or (isinstance(source, str) and is_hub_id(source))):
        return open_checkpoint(source, label=label)
    try:
        folder = Path(str(source)) if is_adapter(source) else download(str(source))
        if is_adapter(folder):
            return _open_adapter(folder, base, label or str(source), canonical_names)
    except CheckpointError as error:
        raise CheckpointError(f"'{shown(label)}': {error}" if label else str(error)) from error
    return open_checkpoint(source, label=label)


def adapter_files(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The weights' file and the configuration of an adapter's folder; `CheckpointError` for what is no plain LoRA."""
    config = _configuration(folder / _CONFIG)
    file = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise refusal(folder, f"has no {_WEIGHTS[0]}", "copy or download the adapter again")
    return file, config


def factor_name(module: str, side: str) -> str:
    """The name under which the factor A or B of a module is stored."""
    return f"{_PREFIX}{module}.lora_{side}.weight"


def module_and_side(stored: str) -> tuple[str, str] | None:
    """What `factor_name` was made of; None for a tensor that is no factor."""
    match = _FACTOR.fullmatch(stored.removeprefix(_PREFIX))
    return (match["module"], match["side"]) if match else None


def _open_adapter(folder: Path, base: Checkpoint, label: str, canonical_names: Naming | None) -> Checkpoint:
    file, config = adapter_files(folder)
    weights = open_checkpoint(file)
    sides, replaced = _sorted_out(weights, base, folder, canonical_names)
    made = lru_cache(maxsize=2)(lambda module: _factors(weights, sides[module], config, module))  # slices come in order
    entries = {name: _untouched(base, name) for name in base}
    for module, found in sides.items():
        _check_factors(base, module, found, weights, config, folder)
        entries[f"{module}.weight"] = _adapted(base, f"{module}.weight", partial(made, module))
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


def _sorted_out(
    weights: Checkpoint, base: Checkpoint, folder: Path, canonical_names: Naming | None
) -> tuple[Sides, dict[str, str]]:
    """Module → side → stored name of each factor; and name in the base → stored name of what is replaced whole."""
    sides: Sides = {}
    replaced: dict[str, str] = {}
    for stored in weights:
        found = module_and_side(stored)
        if found is None:
            replaced[re.sub(r"\.(modules_to_save|base_layer)\b", "", stored.removeprefix(_PREFIX))] = stored
        else:
            sides.setdefault(found[0], {})[found[1]] = stored
    if canonical_names is not None:
        in_base = _names_in_base([*(f"{module}.weight" for module in sides), *replaced], base, canonical_names)
        sides = {in_base[f"{module}.weight"].removesuffix(".weight"): found for module, found in sides.items()}
        replaced = {in_base[name]: stored for name, stored in replaced.items()}
    for name in (f"{module}.weight" for module in sides):
        if name not in base:
            raise refusal(folder, f"adapts '{shown(name)}', which the base lacks", "give the base it was trained on")
    if not sides and not replaced:
        raise refusal(folder, "holds no weights", "copy or download the adapter again")
    return sides, replaced


def _names_in_base(names: Sequence[str], base: Checkpoint, canonical_names: Naming) -> dict[str, str]:
    """What the base calls the tensors that an adapter names; names that it has itself stay."""
    told = {given: name for name, given in canonical_names(names).items()}
    return {name: name if name in base else told.get(name, name) for name in names}


def _check_factors(
    base: Checkpoint,
    module: str,
    found: Mapping[str, str],
    weights: Checkpoint,
    config: Mapping[str, Any],
    folder: Path,
) -> None:
    name = f"{module}.weight"
    if set(found) != {"A", "B"}:
        raise refusal(folder, f"has only one of the two factors of '{shown(name)}'", "copy the adapter again")
    spec, up, down = base.specs[name], weights.specs[found["B"]], weights.specs[found["A"]]
    rows, columns = up.shape[0], math.prod(down.shape[1:])
    wanted = (columns, rows) if config.get("fan_in_fan_out") else (rows, columns)
    if up.shape[1] != down.shape[0] or wanted != (spec.shape[0], math.prod(spec.shape[1:])):
        problem = f"has factors of shapes {up.shape} and {down.shape} for '{shown(name)}' of shape {spec.shape}"
        raise refusal(folder, problem, "give the base it was trained on")


def _factors(weights: Checkpoint, found: Mapping[str, str], config: Mapping[str, Any], module: str) -> Factors:
    left, right = (weights[found[side]].flatten(1).float() for side in "BA")
    left = left * scale_of(config, module)
    return Factors(right.T.contiguous(), left.T.contiguous()) if config.get("fan_in_fan_out") else Factors(left, right)


def _adapted(base: Checkpoint, name: str, factors: Callable[[], Factors]) -> Entry:
    spec = base.specs[name]
    part = lambda start, stop: _sum(base, name, factors(), start, stop)
    return Entry(spec, lambda: part(0, spec.numel).view(spec.shape).to(spec.dtype), None, factors, part)


def _sum(base: Checkpoint, name: str, factors: Factors, start: int, stop: int) -> Tensor:
    """Entries start … stop of base + B·A, in float32 at least.

    B·A is made in blocks of rows that lie the same for every slice, so that an entry does not depend on its slice.
    """
    tensor = base.flat(name)[start:stop]
    tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    if start == stop:
        return tensor
    columns = factors.down.shape[1]
    rows = max(1, _BLOCK // max(1, columns))
    first = start // columns // rows * rows
    blocks = [factors.up[i : i + rows] @ factors.down for i in range(first, math.ceil(stop / columns), rows)]
    product = torch.cat(blocks).view(-1)[start - first * columns : stop - first * columns]
    return tensor + product


def _untouched(base: Checkpoint, name: str) -> Entry:
    shape = base.specs[name].shape
    rows = shape[0] if shape else 1
    columns = base.specs[name].numel // max(1, rows)
    identity = (id(base), base.aliases.get(name, name)) if name in {*base.aliases, *base.aliases.values()} else None
    return Entry(base.specs[name], lambda: base[name], identity, lambda: Factors.none(rows, columns))


def scale_of(config: Mapping[str, Any], module: str) -> float:
    """lora_alpha / r, or / √r with rank stabilisation; both may have a pattern of their own for some modules."""
    rank = _patterned(config.get("rank_pattern"), module, config["r"])
    alpha = _patterned(config.get("alpha_pattern"), module, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _patterned(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default
