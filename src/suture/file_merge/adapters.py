"""Adapters merged into one adapter, without a base: Σ c·B·A is itself of low rank.

The factors are set beside one another, which is exact and has the sum of the ranks, or that sum is cut to a lower rank
by a singular value decomposition, the best there is for that rank. Only methods that are linear in the task vectors
can be.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from suture.checkpoints import Checkpoint, open_checkpoint, provenance_of, save_checkpoint
from suture.checkpoints.adapters import adapter_files, factor_name, module_and_side, scale_of
from suture.checkpoints.provenance import PROVENANCE
from suture.errors import ConfigError, IncompatibleModels
from suture.merging.registry import MergeMethod
from suture.merging.streams import one_each
from suture.storage.atomic import check_replaceable, new_directory

_LINEAR = ("task_arithmetic", "simple_average")
Pair = tuple[Float[Tensor, "rows rank"], Float[Tensor, "rank columns"]]


class Adapter(NamedTuple):
    """One adapter: its configuration, its weights, and module → side → stored name."""

    config: Mapping[str, Any]
    weights: Checkpoint
    modules: Mapping[str, Mapping[str, str]]


def merge_adapters(
    models: Mapping[str, str | Path],
    method: MergeMethod,
    knobs: Mapping[str, Any],
    output: Path,
    *,
    rank: int | None = None,
    overwrite: bool = False,
) -> None:
    """Write one adapter's folder, as `peft` saves it, with the sum or the mean of several adapters' task vectors.

    `rank` cuts the result; without it the result is exact. Raises `ConfigError` for a method that is not linear and
    `IncompatibleModels` for adapters that hold more than factors, or whose modules have other shapes.
    """
    check_replaceable(output, overwrite, inputs=models.values())
    adapters = [_open(Path(path), name) for name, path in models.items()]
    factors = _factors(method, method.knobs.validate(knobs), len(adapters))
    modules = sorted({module for adapter in adapters for module in adapter.modules})
    tensors, ranks = {}, {}
    for module in modules:
        up, down = _merged(
            [(c, a) for c, a in zip(factors, adapters, strict=True) if module in a.modules], module, rank
        )
        tensors |= {factor_name(module, "A"): down, factor_name(module, "B"): up}
        ranks[module] = up.shape[1]
    with new_directory(output, overwrite=overwrite, inputs=models.values()) as folder:
        save_checkpoint(tensors, folder / "adapter_model.safetensors")
        config = _merged_config([adapter.config for adapter in adapters], ranks)
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        origin = provenance_of({adapter.weights.label: adapter.weights for adapter in adapters})
        (folder / PROVENANCE).write_text(json.dumps(origin, indent=2) + "\n", "utf-8")


def _open(folder: Path, name: str) -> Adapter:
    file, config = adapter_files(folder)
    weights = open_checkpoint(file, label=name)
    modules: dict[str, dict[str, str]] = {}
    for stored in weights:
        found = module_and_side(stored)
        if found is None:
            raise IncompatibleModels(
                f"'{stored}' in '{name}' is no factor of a low rank, so there is no one adapter for it. "
                "Remedy: give base=PATH to merge into the base."
            )
        modules.setdefault(found[0], {})[found[1]] = stored
    for module, sides in modules.items():
        if set(sides) != {"A", "B"}:
            raise IncompatibleModels(f"'{name}' has only one of the two factors of '{module}'.")
    return Adapter(config, weights, modules)


def _factors(method: MergeMethod, knobs: Mapping[str, Any], count: int) -> list[float]:
    """The factor of each task vector."""
    weights = one_each(knobs.get("weights") or [1.0] * count, count, "weights")
    if method.name not in _LINEAR:
        raise ConfigError(
            f"{method.name} cannot merge adapters into one adapter. Remedy: method=task_arithmetic or simple_average, "
            "or give base=PATH to merge into the base."
        )
    if method.name == "task_arithmetic":
        return [knobs["scaling_factor"] * weight for weight in weights]
    return [weight / sum(weights) if knobs["normalize"] else weight for weight in weights]


def _merged(parts: Sequence[tuple[float, Adapter]], module: str, rank: int | None) -> Pair:
    """B and A of the sum over adapters, in the first one's dtype and with the shapes that peft gives them."""
    stored = [(adapter.modules[module], adapter) for _, adapter in parts]
    ups, downs = ([adapter.weights[sides[side]] for sides, adapter in stored] for side in "BA")
    if len({(up.shape[0], up.shape[2:]) for up in ups}) > 1 or len({down.shape[1:] for down in downs}) > 1:
        raise IncompatibleModels(f"'{module}' has other shapes in some adapters. Remedy: merge adapters of one base.")
    scaled = [up.float() * (c * scale_of(a.config, module)) for up, (c, a) in zip(ups, parts, strict=True)]
    up, down = torch.cat(scaled, dim=1), torch.cat([down.float() for down in downs])
    if rank is not None and rank < up.shape[1]:
        left, right = _cut(up.flatten(1), down.flatten(1), rank)
        up, down = left.view(up.shape[0], rank, *up.shape[2:]), right.view(rank, *down.shape[1:])
    return up.to(ups[0].dtype), down.to(downs[0].dtype)


def _cut(up: Float[Tensor, "rows whole"], down: Float[Tensor, "whole columns"], rank: int) -> Pair:
    """The product's best approximation of a lower rank, found from the factors without making the product."""
    (q_up, r_up), (q_down, r_down) = torch.linalg.qr(up.double()), torch.linalg.qr(down.double().T)
    left, values, right = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    roots = values[:rank].sqrt()
    return (q_up @ left[:, :rank] * roots).float(), (roots[:, None] * right[:rank] @ q_down.T).float()


def _merged_config(configs: Sequence[Mapping[str, Any]], ranks: Mapping[str, int]) -> dict[str, Any]:
    """A configuration under which every module is scaled by 1."""
    if len({bool(config.get("fan_in_fan_out")) for config in configs}) > 1:
        raise IncompatibleModels("fan_in_fan_out differs between the adapters. Remedy: merge adapters of one base.")
    most = max(ranks.values())
    others = {module: rank for module, rank in ranks.items() if rank != most}
    targets = sorted({module.rsplit(".", 1)[-1] for module in ranks})
    scaled = {"r": most, "lora_alpha": most, "rank_pattern": others, "alpha_pattern": others, "use_rslora": False}
    return {**configs[0], **scaled, "target_modules": targets}
