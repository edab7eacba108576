"""Adapters merged into one adapter, without a base: Σ c·B·A is itself of low rank.

The factors are set beside one another, which is exact and has the sum of the ranks; or a method merges them in a space
that they share (`adapter_spaces`). Either result may be cut to a lower rank by a singular value decomposition, the best
there is for that rank.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from suture.checkpoints import Checkpoint, open_checkpoint, provenance_of, save_checkpoint
from suture.checkpoints.adapter_bases import base_notes
from suture.checkpoints.adapter_configs import scale_of, start_of
from suture.checkpoints.adapters import adapter_files, factor_name, module_and_side
from suture.checkpoints.provenance import PROVENANCE
from suture.errors import ConfigError, IncompatibleModels
from suture.file_merge.adapter_spaces import SPACES, Pair, merge_in_space
from suture.merging.registry import MergeMethod
from suture.merging.streams import one_each
from suture.storage.atomic import check_replaceable, new_directory

_LINEAR = ("task_arithmetic", "simple_average")


class Adapter(NamedTuple):
    """One adapter: its configuration, its weights, and module → side → stored name."""

    config: Mapping[str, Any]
    weights: Checkpoint
    modules: Mapping[str, Mapping[str, str]]


class Cut(NamedTuple):
    """A product of a lower rank, its squared norm before the cut, and that of what the cut took away."""

    pair: Pair
    whole: float
    lost: float


def merge_adapters(
    models: Mapping[str, str | Path],
    method: MergeMethod,
    knobs: Mapping[str, Any],
    output: Path,
    *,
    rank: int | None = None,
    space: str | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Write one adapter's folder, as `peft` saves it; returns notes: what it cost to cut it to `rank`, and other bases.

    Without a `space` the result is the sum or the mean of the task vectors, exactly; with one, any method merges them
    there. Raises `ConfigError` for another method without a space, and `IncompatibleModels` for adapters that hold more
    than factors, or whose modules have other shapes.
    """
    check_replaceable(output, overwrite, inputs=models.values())
    adapters = [_open(Path(path), name) for name, path in models.items()]
    knobs = method.knobs.validate(knobs)
    modules = sorted({module for adapter in adapters for module in adapter.modules})
    if space is None:
        factors = _factors(method, knobs, len(adapters))
        merged = {module: _beside(adapters, factors, module) for module in modules}
    else:
        merged = merge_in_space({module: _pairs(adapters, module) for module in modules}, space, method, knobs)
    cuts = {module: _cut(pair, rank) for module, pair in merged.items()}
    tensors = {name: t for module, cut in cuts.items() for name, t in _stored(adapters, module, cut.pair).items()}
    report = _report(cuts, rank)
    with new_directory(output, overwrite=overwrite, inputs=models.values()) as folder:
        save_checkpoint(tensors, folder / "adapter_model.safetensors")
        ranks = {module: cut.pair.up.shape[1] for module, cut in cuts.items()}
        config = _merged_config([adapter.config for adapter in adapters], ranks)
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        origin = provenance_of({adapter.weights.label: adapter.weights for adapter in adapters})
        origin |= {"adapter": {"method": method.name, "space": space, "rank": rank, "report": report}}
        (folder / PROVENANCE).write_text(json.dumps(origin, indent=2) + "\n", "utf-8")
    return [*base_notes({adapter.weights.label: adapter.weights for adapter in adapters}), *report]


def _open(folder: Path, name: str) -> Adapter:
    file, config = adapter_files(folder)
    for key, needed in (
        ("init_lora_weights", start_of(config)),
        ("target_parameters", config.get("target_parameters")),
    ):
        if needed:
            raise IncompatibleModels(f"'{name}' has {key}={needed}, which needs its base. Remedy: give base=PATH.")
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
            f"{method.name} cannot merge adapters into one adapter. Remedy: method=task_arithmetic or simple_average; "
            f"space={', '.join(SPACES[:-1])} or {SPACES[-1]} for any method; or base=PATH, to merge into the base."
        )
    if method.name == "task_arithmetic":
        return [knobs["scaling_factor"] * weight for weight in weights]
    return [weight / sum(weights) if knobs["normalize"] else weight for weight in weights]


def _pairs(adapters: Sequence[Adapter], module: str) -> list[Pair]:
    """Every adapter's product of one module, with its scale; of rank 0 where it does not change the module."""
    having = [adapter for adapter in adapters if module in adapter.modules]
    shapes = {tuple(tuple(a.weights.specs[a.modules[module][side]].shape) for side in "BA") for a in having}
    if len({(up[0], up[2:]) for up, _ in shapes}) > 1 or len({down[1:] for _, down in shapes}) > 1:
        raise IncompatibleModels(f"'{module}' has other shapes in some adapters. Remedy: merge adapters of one base.")
    up, down = (having[0].weights[having[0].modules[module][side]].flatten(1) for side in "BA")
    none = Pair(torch.zeros(len(up), 0, dtype=torch.float64), torch.zeros(0, down.shape[1], dtype=torch.float64))
    return [_pair(adapter, module) if module in adapter.modules else none for adapter in adapters]


def _pair(adapter: Adapter, module: str) -> Pair:
    up, down = (adapter.weights[adapter.modules[module][side]].flatten(1).double() for side in "BA")
    return Pair(up * scale_of(adapter.config, module), down)


def _beside(adapters: Sequence[Adapter], factors: Sequence[float], module: str) -> Pair:
    """The sum of the products, each times its factor, with the sum of their ranks."""
    pairs = _pairs(adapters, module)
    ups = [pair.up * c for pair, c in zip(pairs, factors, strict=True)]
    return Pair(torch.cat(ups, 1), torch.cat([pair.down for pair in pairs]))


def _cut(pair: Pair, rank: int | None) -> Cut:
    """The product's best approximation of a lower rank, found from the factors without making the product."""
    if rank is None or rank >= pair.up.shape[1]:
        return Cut(pair, 0.0, 0.0)
    (q_up, r_up), (q_down, r_down) = torch.linalg.qr(pair.up), torch.linalg.qr(pair.down.T)
    left, values, right = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    roots = values[:rank].sqrt()
    squares = values.square()
    cut = Pair(q_up @ left[:, :rank] * roots, roots[:, None] * right[:rank] @ q_down.T)
    return Cut(cut, float(squares.sum()), float(squares[rank:].sum()))


def _report(cuts: Mapping[str, Cut], rank: int | None) -> list[str]:
    """What the cut took away: of the norm of all, and of the module where it is most."""
    whole = sum(cut.whole for cut in cuts.values())
    if not whole:
        return []
    share = lambda lost, of: (lost / of) ** 0.5
    worst = max((m for m in cuts if cuts[m].whole), key=lambda m: share(cuts[m].lost, cuts[m].whole))
    total = share(sum(cut.lost for cut in cuts.values()), whole)
    most = share(cuts[worst].lost, cuts[worst].whole)
    line = f"cut to rank {rank}: {total:.3g} of the norm of the merged task vector is lost"
    return [f"{line}, {most:.3g} at most in one module ('{worst}')"]


def _stored(adapters: Sequence[Adapter], module: str, pair: Pair) -> dict[str, Tensor]:
    """The factors as peft stores them, in the dtype and with the axes of the first adapter that has the module."""
    adapter = next(adapter for adapter in adapters if module in adapter.modules)
    up, down = (adapter.weights.specs[adapter.modules[module][side]] for side in "BA")
    rank = pair.up.shape[1]
    return {
        factor_name(module, "A"): pair.down.reshape(rank, *down.shape[1:]).to(down.dtype).contiguous(),
        factor_name(module, "B"): pair.up.reshape(up.shape[0], rank, *up.shape[2:]).to(up.dtype).contiguous(),
    }


def _merged_config(configs: Sequence[Mapping[str, Any]], ranks: Mapping[str, int]) -> dict[str, Any]:
    """A configuration under which every module is scaled by 1."""
    if len({bool(config.get("fan_in_fan_out")) for config in configs}) > 1:
        raise IncompatibleModels("fan_in_fan_out differs between the adapters. Remedy: merge adapters of one base.")
    most = max([1, *ranks.values()])
    others = {module: rank for module, rank in ranks.items() if rank != most}
    targets = sorted({module.rsplit(".", 1)[-1] for module in ranks})
    scaled = {"r": most, "lora_alpha": most, "rank_pattern": others, "alpha_pattern": others, "use_rslora": False}
    return {**configs[0], **scaled, "target_modules": targets}
