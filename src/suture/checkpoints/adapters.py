"""LoRA adapters as `peft` saves them (https://arxiv.org/abs/2106.09685): a fine-tuned model as base + scale · B·A.

The sums are made when they are read, tensor by tensor or slice by slice, so nothing of the base's size is held; and the
factors stay available to whoever can work with them.
"""

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from suture.checkpoints.adapter_configs import MERGE_FIRST, is_conv1d, may_be_conv1d, rank_of, read_config, scale_of
from suture.checkpoints.checkpoint import Checkpoint, Entry, Factors, TensorSpec
from suture.checkpoints.opening import Source, check_text, open_checkpoint
from suture.checkpoints.quantised import quantised_problem
from suture.core.names import short
from suture.errors import CheckpointError, refusal, shown
from suture.storage.hub import download, is_hub_id

_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight")
Sides = dict[str, dict[str, str]]
Naming = Callable[[Iterable[str]], Mapping[str, str]]
_BLOCK = 1 << 16  # entries of B·A that are made at once
#: Parts of the names of what `peft` stores beside the two factors, and what it is.
_OTHERS = {
    "lora_embedding_": "a factor of an embedding",
    "lora_magnitude_vector": "the magnitudes of DoRA",
    "lora_": "a part of LoRA that is not one of its two factors",
    "trainable_tokens_delta": "rows of an embedding (trainable_token_indices)",
    "hada_": "a factor of LoHa",
    "lokr_": "a factor of LoKr",
    "ia3_": "a vector of IA³",
    "vera_": "a vector of VeRA",
    "oft_": "a rotation of OFT",
    "prompt_": "a prompt",
}


def is_adapter(source: Source) -> bool:
    """Whether a source is a folder that holds a LoRA adapter and no whole model."""
    if not isinstance(source, str | os.PathLike):
        return False
    try:
        return (Path(source) / _CONFIG).is_file()
    except OSError:  # no permission, a name too long: whoever opens it says so
        return False


def open_fine_tuned(
    source: Source, base: Checkpoint, *, label: str | None = None, canonical_names: Naming | None = None
) -> Checkpoint:
    """A fine-tuned model: whatever `open_checkpoint` takes, or a LoRA adapter, which is opened on its base.

    `canonical_names(names)` maps the base's names to those of an adapter that calls its tensors otherwise. Raises
    `CheckpointError`, also for an adapter that fits nothing in the base or that is of a kind other than LoRA.
    """
    if not (is_adapter(source) or (isinstance(source, str) and is_hub_id(source))):
        return open_checkpoint(source, label=label)
    check_text(str(source), label)
    try:
        folder = Path(str(source)) if is_adapter(source) else download(str(source))
        if is_adapter(folder):
            return _open_adapter(folder, base, label or str(source), canonical_names)
    except CheckpointError as error:
        raise CheckpointError(f"'{shown(label)}': {error}" if label else str(error)) from error
    return open_checkpoint(source, label=label)


def adapter_files(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The weights' file and the configuration of an adapter's folder; `CheckpointError` for what is no plain LoRA."""
    config = read_config(folder / _CONFIG)
    file = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise refusal(folder, f"has no {_WEIGHTS[0]}", "copy or download the adapter again")
    return file, config


def factor_name(module: str, side: str) -> str:
    """The name under which the factor A or B of a module is stored."""
    return f"{_PREFIX}{module}.lora_{side}.weight"


def module_and_side(stored: str) -> tuple[str, str] | None:
    """The module and side that make up a factor's name; None for a tensor that is no factor."""
    match = _FACTOR.fullmatch(stored.removeprefix(_PREFIX))
    return (match["module"], match["side"]) if match else None


def _open_adapter(folder: Path, base: Checkpoint, label: str, canonical_names: Naming | None) -> Checkpoint:
    if problem := quantised_problem(base):
        raise CheckpointError(problem)
    file, config = adapter_files(folder)
    weights = open_checkpoint(file)
    sides, replaced = _sorted_out(weights, base, folder, canonical_names)
    turned = _turned(base, weights, sides, config, folder)
    factors = lru_cache(maxsize=2)(  # slices come in order
        lambda module: _factors(weights, sides[module], config, turned[module])
    )
    entries = {name: _untouched(base, name) for name in base}
    for module in sides:
        entries[f"{module}.weight"] = _adapted(base, f"{module}.weight", partial(factors, module))
    for name, stored in replaced.items():
        entries[name] = Entry(weights.specs[stored], lambda stored=stored: weights[stored])
    return Checkpoint(entries, label, files=(file,), directory=None)


def _sorted_out(
    weights: Checkpoint, base: Checkpoint, folder: Path, canonical_names: Naming | None
) -> tuple[Sides, dict[str, str]]:
    """Module → side → stored name of each factor; and name in the base → stored name of what is replaced whole."""
    sides: Sides = {}
    replaced: dict[str, str] = {}
    for name in weights:
        module, side = module_and_side(name) or (None, "")
        if module is None:
            replaced[_replaced_name(name, folder)] = name
        elif side in sides.setdefault(module, {}):
            raise refusal(folder, f"has the factor {side} of '{shown(module)}' twice", "save one adapter by itself")
        else:
            sides[module][side] = name
    if canonical_names is not None:
        in_base = _names_in_base([*(f"{module}.weight" for module in sides), *replaced], base, canonical_names)
        sides = {in_base[f"{module}.weight"].removesuffix(".weight"): stored for module, stored in sides.items()}
        replaced = {in_base[name]: stored for name, stored in replaced.items()}
    for module, stored in sides.items():
        if f"{module}.weight" not in base:
            problem = f"adapts '{shown(module)}.weight', which the base lacks"
            raise refusal(folder, problem, "give the base it was trained on")
        if set(stored) != {"A", "B"}:
            problem = f"has only one of the two factors of '{shown(module)}.weight'"
            raise refusal(folder, problem, "copy the adapter again")
    if not sides and not replaced:
        raise refusal(folder, "holds no weights", "copy or download the adapter again")
    return sides, replaced


def _replaced_name(stored: str, folder: Path) -> str:
    """The base's name of a tensor that an adapter holds whole; refuses what belongs to another kind of adapter."""
    name = stored.removeprefix(_PREFIX)
    for part, what in _OTHERS.items():
        if any(each.startswith(part) for each in name.split(".")):
            raise refusal(folder, f"holds '{shown(stored)}', {what}, which is not read", MERGE_FIRST)
    return re.sub(r"\.(modules_to_save|base_layer)\b", "", name)


def _names_in_base(names: Sequence[str], base: Checkpoint, canonical_names: Naming) -> dict[str, str]:
    """The base's names of the tensors that an adapter names; names that the base has stay."""
    of_base = {given: name for name, given in canonical_names(names).items()}
    return {name: name if name in base else of_base.get(name, name) for name in names}


def _turned(
    base: Checkpoint, weights: Checkpoint, sides: Sides, config: Mapping[str, Any], folder: Path
) -> dict[str, bool]:
    """Module → whether its weight is (in, out), as that of a Conv1D, and B·A has to be transposed.

    `fan_in_fan_out` does not say: peft sets it anew for each module and stores what it was for the last. The shapes do,
    but for square weights. Of those the base's configuration says; without one they are Linear, if nothing hints at a
    Conv1D.
    """
    fits = {
        module: _fits(base.specs[f"{module}.weight"], weights, stored, config, folder)
        for module, stored in sides.items()
    }
    hint_at_conv1d = config.get("fan_in_fan_out") or (False, True) in fits.values() or any(map(may_be_conv1d, fits))
    turned = {}
    for module, (straight, transposed) in fits.items():
        known = is_conv1d(base.directory, module) if straight and transposed else transposed
        if known is None and hint_at_conv1d:
            problem = f"adapts the square '{shown(module)}.weight', which may be a Linear or a Conv1D"
            raise refusal(folder, problem, "give the base as a model directory with its config.json")
        turned[module] = bool(known)
    return turned


def _fits(
    spec: TensorSpec, weights: Checkpoint, stored: Mapping[str, str], config: Mapping[str, Any], folder: Path
) -> tuple[bool, bool]:
    """Whether B·A has the shape of a weight, and whether its transpose has; refuses factors of which neither fits."""
    up, down, module = weights.specs[stored["B"]], weights.specs[stored["A"]], _own_name(stored)
    if not all(each.dtype.is_floating_point for each in (spec, up, down)):
        problem = f"adapts '{shown(module)}' of {short(spec.dtype)} by {short(up.dtype)} and {short(down.dtype)}"
        raise refusal(folder, problem, "give base and adapter in a floating-point dtype")
    straight = transposed = False
    if min(len(spec.shape), len(up.shape), len(down.shape)) >= 2 and up.shape[1] == down.shape[0]:
        product = (up.shape[0], math.prod(down.shape[1:]))
        straight = product == (spec.shape[0], math.prod(spec.shape[1:]))
        transposed = product[::-1] == spec.shape
    if not straight and not transposed:
        problem = (
            f"has factors of shapes {up.shape} and {down.shape} for '{shown(module)}.weight' of shape {spec.shape}"
        )
        raise refusal(folder, problem, "give the base it was trained on")
    if up.shape[1] != rank_of(config, module):
        problem = (
            f"has factors of rank {up.shape[1]} for '{shown(module)}', {rank_of(config, module)} in its configuration"
        )
        raise refusal(folder, problem, "copy or download weights and configuration together")
    return straight, transposed


def _own_name(stored: Mapping[str, str]) -> str:
    """The adapter's own name of a module, for the patterns of its configuration."""
    return (module_and_side(stored["A"]) or ("", ""))[0]


def _factors(weights: Checkpoint, stored: Mapping[str, str], config: Mapping[str, Any], turned: bool) -> Factors:
    left, right = (weights[stored[side]].flatten(1).float() for side in "BA")
    left = left * scale_of(config, _own_name(stored))
    return Factors(right.T.contiguous(), left.T.contiguous()) if turned else Factors(left, right)


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
