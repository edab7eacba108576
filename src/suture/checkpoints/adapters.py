"""Adapters as `peft` saves them: a fine-tuned model as its base, changed tensor by tensor.

LoRA and its relatives, IA³, LoHa, LoKr, VeRA, trained tokens and tuned norms (`adapter_kinds` has their arithmetic).
Tuned tensors are made when they are read, slice by slice, so nothing of the base's size is held; and the factors of
LoRA stay available to whoever can work with them.
"""

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from suture.checkpoints import adapter_kinds as kinds
from suture.checkpoints.adapter_configs import (
    MERGE_FIRST,
    is_conv1d,
    is_feedforward,
    may_be_conv1d,
    rank_of,
    read_config,
    scale_of,
    start_of,
    token_rows,
)
from suture.checkpoints.adapter_kinds import Update
from suture.checkpoints.checkpoint import Checkpoint, Entry, Factors, TensorSpec
from suture.checkpoints.json_files import model_config
from suture.checkpoints.opening import Source, check_text, open_checkpoint
from suture.checkpoints.quantised import quantised_problem
from suture.core.names import short
from suture.errors import CheckpointError, refusal, shown
from suture.storage.hub import download, is_hub_id

_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
#: Kind of adapter → the names of its tensors, below those of the modules that they change.
_PARTS = {
    "LORA": (
        *("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"),
        r"token_adapter\.trainable_tokens_delta",
    ),
    "IA3": ("ia3_l",),
    "LOHA": tuple(f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    "LOKR": tuple(f"lokr_{part}" for part in ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b", "t2")),
    "VERA": ("vera_lambda_b", "vera_lambda_d"),
    "TRAINABLE_TOKENS": ("trainable_tokens_delta",),
    "LN_TUNING": (),
}
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight")
_PROJECTIONS = {"base_model.vera_A": "A", "base_model.vera_B": "B"}
Naming = Callable[[Iterable[str]], Mapping[str, str]]
_BLOCK = 1 << 16  # entries of a tuned tensor that are made at once
#: Parts of the names of what `peft` stores for each kind of adapter, and what it is.
_OTHERS = {
    "lora_": "a part of LoRA that is not known",
    "trainable_tokens_delta": "rows of an embedding",
    "hada_": "a factor of LoHa",
    "lokr_": "a factor of LoKr",
    "ia3_": "a vector of IA³",
    "vera_": "a vector of VeRA",
    "oft_": "a rotation of OFT",
    "prompt_": "a prompt",
}


def is_adapter(source: Source) -> bool:
    """Whether a source is a folder that holds an adapter and no whole model."""
    if not isinstance(source, str | os.PathLike):
        return False
    try:
        return (Path(source) / _CONFIG).is_file()
    except OSError:  # no permission, a name too long: whoever opens it says so
        return False


def open_fine_tuned(
    source: Source,
    base: Checkpoint,
    *,
    label: str | None = None,
    canonical_names: Naming | None = None,
    key: str | None = None,
) -> Checkpoint:
    """A fine-tuned model: whatever `open_checkpoint` takes, or an adapter, which is opened on its base.

    `key` is that of `open_checkpoint`. `canonical_names(names)` maps the base's names to those of an adapter that calls
    its tensors otherwise. Raises `CheckpointError`, also for an adapter that fits nothing in the base or that is of a
    kind which is not read.
    """
    if not (is_adapter(source) or (isinstance(source, str) and is_hub_id(source))):
        return open_checkpoint(source, label=label, key=key)
    check_text(str(source), label)
    try:
        folder = Path(str(source)) if is_adapter(source) else download(str(source))
        if is_adapter(folder):
            return _open_adapter(folder, base, label or str(source), canonical_names)
    except CheckpointError as error:
        raise CheckpointError(f"'{shown(label)}': {error}" if label else str(error)) from error
    return open_checkpoint(source, label=label, key=key)


def adapter_files(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The weights' file and the configuration of an adapter's folder; `CheckpointError` for what is not read."""
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


@dataclass
class _Adapter:
    """An adapter beside its base: module → part → stored name, and name in the base → stored name of what it replaces.

    `modules` are the adapter's own names of the modules; `tensor(module)` is the base's name of the weight;
    `parameters` are those of modules that `target_parameters` names.
    """

    folder: Path
    config: Mapping[str, Any]
    weights: Checkpoint
    base: Checkpoint
    modules: dict[str, dict[str, str]] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    projections: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    turned: dict[str, bool] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return self.config["peft_type"]

    def tensor(self, module: str, parameter: str = "weight") -> str:
        """The base's name of a module's parameter."""
        return self.names.get(f"{module}.{parameter}", f"{module}.{parameter}")

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a tensor before the adapter's update: the base's, or the one that takes its place."""
        return self.weights.specs[self.replaced[name]] if name in self.replaced else self.base.specs[name]

    def part(self, module: str, part: str) -> Tensor:
        """One of the adapter's tensors, in float32 at least."""
        tensor = self.weights[self.modules[module][part]]
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

    def parts(self, module: str) -> dict[str, Tensor]:
        """All of the adapter's tensors of a module, in float32 at least."""
        return {part: self.part(module, part) for part in self.modules[module]}

    def entries(self, name: str, start: int, stop: int) -> Tensor:
        """Some entries of a tensor before its update, in float32 at least."""
        source = self.weights.flat(self.replaced[name]) if name in self.replaced else self.base.flat(name)
        piece = source[start:stop]
        return piece.to(torch.promote_types(piece.dtype, torch.float32))

    def refuse(self, found: str, remedy: str) -> CheckpointError:
        return refusal(self.folder, found, remedy)


def _open_adapter(folder: Path, base: Checkpoint, label: str, canonical_names: Naming | None) -> Checkpoint:
    if problem := quantised_problem(base):
        raise CheckpointError(problem)
    file, config = adapter_files(folder)
    adapter = _Adapter(folder, config, open_checkpoint(file), base)
    _sort_out(adapter)
    _find_in_base(adapter, canonical_names)
    _check_parts(adapter)
    entries = {name: _untouched(base, name) for name in base}
    for name, stored in adapter.replaced.items():
        entries[name] = Entry(adapter.weights.specs[stored], partial(adapter.weights.__getitem__, stored))
    for name, make in _updates(adapter).items():
        _check_tie(adapter, name)
        for each in _tied(base, name):
            entries[each] = _adapted(adapter, name, make)
    return Checkpoint(entries, label, files=(file,), directory=None)


def untied(base: Checkpoint, sources: Iterable[Source]) -> Checkpoint:
    """The base with a copy of its own for every tied tensor of which some adapter changes one name alone.

    peft trains such an adapter with the other name at the base, so no tied model is equal to it.
    """
    folders = [Path(str(source)) for source in sources if is_adapter(source)]
    apart: dict[str, str] = {}
    for folder in folders:
        file, config = adapter_files(folder)
        adapter = _Adapter(folder, config, open_checkpoint(file), base)
        _sort_out(adapter)
        for module, parts in adapter.modules.items():
            group = _tie(base, f"{module}.weight")
            if len(group) > 1 and "trainable_tokens_delta" not in parts:
                apart |= group
    return base.untied(apart) if apart else base


def _tie(base: Checkpoint, name: str) -> dict[str, str]:
    """All names that a tensor is tied under → those that the base stores, the head of its configuration included."""
    head = _tied_head(base)
    names = set(_tied(base, head.get(name, name)))
    group = {each: each for each in names if each in base}
    return group | {each: stored for each, stored in head.items() if stored in names}


def _tied_head(base: Checkpoint) -> dict[str, str]:
    """The head that a base does not store because its configuration ties it: its name, and that of the embedding."""
    if "lm_head.weight" in base or not model_config(base.directory).get("tie_word_embeddings"):
        return {}
    tables = [name for name in base if name.rpartition(".")[0].endswith(("embed_tokens", "wte", "word_embeddings"))]
    return {"lm_head.weight": tables[0]} if len(tables) == 1 else {}


def _check_tie(adapter: _Adapter, name: str) -> None:
    """Refuse an update of one name of a tied tensor: peft trains it alone, and its merge would change both."""
    tied = sorted(_tie(adapter.base, name).keys() - {name})
    trained = any("trainable_tokens_delta" in parts for parts in adapter.modules.values())
    if tied and not trained:
        found = f"adapts '{shown(name)}', which the base ties to '{shown(tied[0])}': peft trains the one alone"
        raise adapter.refuse(found, "merge files (suture merge …), whose result has both, or untie them in the base")


def _tied(base: Checkpoint, name: str) -> list[str]:
    """All names of a tensor, of which the adapter may have used any."""
    first = base.aliases.get(name, name)
    return [first, *(alias for alias, canonical in base.aliases.items() if canonical == first)]


def _sort_out(adapter: _Adapter) -> None:
    """Sort the stored tensors: parts of a module's update, and tensors that replace the base's."""
    known = "|".join(_PARTS[adapter.kind])
    pattern = re.compile(rf"(.+)\.({known})(?:\.(?!weight$|bias$)[^.]+)?(\.weight|\.bias)?") if known else None
    for stored in adapter.weights:
        if adapter.kind == "VERA" and stored in _PROJECTIONS:
            adapter.projections[_PROJECTIONS[stored]] = stored
            continue
        match = pattern.fullmatch(stored.removeprefix(_PREFIX)) if pattern else None
        if match is None:
            adapter.replaced[_replaced_name(stored, adapter)] = stored
            continue
        part = match[2].rpartition(".")[2] + (".bias" if match[3] == ".bias" else "")
        module = adapter.modules.setdefault(match[1], {})
        if part in module:
            found = f"has the part {part} of '{shown(match[1])}' twice"
            raise adapter.refuse(found, "save one adapter by itself")
        module[part] = stored
    if not adapter.modules and not adapter.replaced:
        raise adapter.refuse("holds no weights", "copy or download the adapter again")


def _replaced_name(stored: str, adapter: _Adapter) -> str:
    """The base's name of a tensor that an adapter holds whole; refuses what belongs to another kind of adapter."""
    name = stored.removeprefix(_PREFIX)
    for part, what in _OTHERS.items():
        if any(each.startswith(part) for each in name.split(".")):
            raise adapter.refuse(f"holds '{shown(stored)}', {what}, which is not read here", MERGE_FIRST)
    name = re.sub(r"\.ln_tuning_layers(\.[^.]+)?(?=\.(weight|bias)$)", "", name)
    return re.sub(r"\.(modules_to_save|base_layer|token_adapter)\b", "", name)


def _find_in_base(adapter: _Adapter, canonical_names: Naming | None) -> None:
    """Find the base's names of all tensors that the adapter changes, and refuse those that it lacks."""
    adapter.parameters = _parameters(adapter)
    for module in adapter.modules:
        adapter.names[f"{module}.weight"] = adapter.parameters.get(module, f"{module}.weight")
        adapter.names[f"{module}.bias"] = f"{module}.bias"
    wanted = [*adapter.names.values(), *adapter.replaced]
    of_base = {given: name for name, given in canonical_names(wanted).items()} if canonical_names else {}
    in_base = {name: name if name in adapter.base else of_base.get(name, name) for name in wanted}
    adapter.names = {own: in_base[name] for own, name in adapter.names.items()}
    adapter.replaced = {in_base[name]: stored for name, stored in adapter.replaced.items()}
    for module in adapter.modules:
        if adapter.tensor(module) not in adapter.base:
            if f"{module}.weight" in _tied_head(adapter.base):
                found = f"adapts '{shown(module)}.weight', which the base ties to its embedding and does not store"
                raise adapter.refuse(found, "merge files (suture merge …), whose result has both")
            found = f"adapts '{shown(module)}.weight', which the base lacks"
            raise adapter.refuse(found, "give the base it was trained on")


def _parameters(adapter: _Adapter) -> dict[str, str]:
    """Module → base's name of the parameter, for those that `target_parameters` names.

    Several parameters of one module are wrapped around each other by peft, in an order that it does not store; the
    shapes have to say which is which.
    """
    named = adapter.config.get("target_parameters") or []
    if not named:
        return {}
    wrapped: dict[str, list[str]] = {}
    for module in adapter.modules:
        wrapped.setdefault(re.sub(r"(\.base_layer)+$", "", module), []).append(module)
    found: dict[str, str] = {}
    for owner, modules in wrapped.items():
        ends = lambda name: any(name == each or name.endswith(f".{each}") for each in named)
        names = [name for name in adapter.base if name.rpartition(".")[0] == owner and ends(name)]
        if not names:
            continue
        fits = [order for order in permutations(names, len(modules)) if _all_fit(adapter, modules, order)]
        if len(fits) != 1:
            problem = "fit no" if not fits else "fit more than one"
            raise adapter.refuse(
                f"has factors for {len(modules)} parameters of '{shown(owner)}' that {problem} order of them",
                MERGE_FIRST,
            )
        found |= dict(zip(modules, fits[0], strict=True))
    return found


def _all_fit(adapter: _Adapter, modules: Sequence[str], names: Sequence[str]) -> bool:
    return all(any(_expert_fits(adapter, module, name)) for module, name in zip(modules, names, strict=True))


def _expert_fits(adapter: _Adapter, module: str, name: str) -> tuple[bool, bool]:
    """Whether factors have the shape of a parameter: as (out, in), and as (in, out)."""
    up, down = (adapter.weights.specs[adapter.modules[module][side]].shape for side in ("lora_B", "lora_A"))
    shape = adapter.base.specs[name].shape
    if len(shape) not in (2, 3) or len(up) != 2 or len(down) != 2:
        return False, False
    experts = shape[0] if len(shape) == 3 else 1
    if up[1] != down[0] or down[0] != experts * rank_of(adapter.config, _configured_name(adapter, module, name)):
        return False, False
    return shape[-2:] == (up[0], down[1]), len(shape) == 3 and shape[-2:] == (down[1], up[0])


def _configured_name(adapter: _Adapter, module: str, name: str) -> str:
    """The name that the patterns of the configuration speak of: a module's, or a targeted parameter's."""
    owner = re.sub(r"(\.base_layer)+$", "", module)
    return f"{owner}.{name.rpartition('.')[2]}" if module in adapter.parameters or owner != module else module


def _is_stack(adapter: _Adapter, module: str) -> bool:
    """Whether a module's update is that of fused experts."""
    return module in adapter.parameters and len(adapter.spec(adapter.parameters[module]).shape) == 3


def _check_parts(adapter: _Adapter) -> None:
    """Refuse parts that are missing or of shapes that do not fit, and find out which weights are (in, out)."""
    for module, parts in adapter.modules.items():
        sides = {"lora_A", "lora_B"} & set(parts)
        if adapter.kind == "LORA" and len(sides) == 1:
            found = f"has only one of the two factors of '{shown(module)}.weight'"
            raise adapter.refuse(found, "copy the adapter again")
        dora = bool(adapter.config.get("use_dora"))
        low_rank = sides or "lora_embedding_A" in parts
        if adapter.kind == "LORA" and low_rank and dora != ("lora_magnitude_vector" in parts):
            found = f"has {'no' if dora else 'a'} lora_magnitude_vector for '{shown(module)}', with use_dora={dora}"
            raise adapter.refuse(found, "copy or download weights and configuration together")
        dtypes = [adapter.spec(adapter.tensor(module)).dtype, *(adapter.weights.specs[n].dtype for n in parts.values())]
        if not all(dtype.is_floating_point for dtype in dtypes):
            found = f"adapts '{shown(module)}' of {short(dtypes[0])} by tensors of {', '.join(map(short, dtypes[1:]))}"
            raise adapter.refuse(found, "give base and adapter in a floating-point dtype")
    _find_turned(adapter)


def _find_turned(adapter: _Adapter) -> None:
    """The weights that are (in, out), as those of a Conv1D, so that an update has to be transposed.

    `fan_in_fan_out` does not say: peft sets it anew for each module and stores what it was for the last. The shapes do,
    but for square weights. Of those the base's configuration says; without one they are Linear, if nothing hints at a
    Conv1D.
    """
    fits = {module: _fits(adapter, module) for module in adapter.modules}
    hints = adapter.config.get("fan_in_fan_out") or (False, True) in fits.values() or any(map(may_be_conv1d, fits))
    for module, (straight, transposed) in fits.items():
        expert = _is_stack(adapter, module)
        known = transposed
        if straight and transposed:
            known = None if expert else is_conv1d(adapter.base.directory, module)
        if known is None and (hints or expert):
            either = "out × in or in × out" if expert else "a Linear or a Conv1D"
            found = f"adapts the square '{shown(adapter.tensor(module))}', which may be {either}"
            remedy = MERGE_FIRST if expert else "give the base as a model directory with its config.json"
            raise adapter.refuse(found, remedy)
        adapter.turned[module] = bool(known)


def _fits(adapter: _Adapter, module: str) -> tuple[bool, bool]:
    """Whether a module's update has the shape of its weight, and whether its transpose has; refuses if neither fits."""
    name = adapter.tensor(module)
    shape = adapter.spec(name).shape
    shapes = {part: adapter.weights.specs[stored].shape for part, stored in adapter.modules[module].items()}
    fits = _SHAPES[adapter.kind](adapter, module, shape, shapes)
    if not any(fits):
        listed = ", ".join(f"{part} {tuple(size)}" for part, size in sorted(shapes.items()))
        problem = f"has {listed} for '{shown(name)}' of shape {shape}"
        if len(shape) > 2 and len(shapes) == 2 and shapes.get("lora_B", (0, 0))[1] != shapes.get("lora_A", (0,))[0]:
            raise adapter.refuse(f"{problem}, as for a convolution in groups, which is not read", MERGE_FIRST)
        raise adapter.refuse(problem, "give the base it was trained on")
    return fits


Shape = tuple[int, ...]


def _either(shape: Shape, rows: int, columns: int) -> tuple[bool, bool]:
    """Whether (rows, columns) is the shape of a weight, and whether it is the transpose's."""
    if len(shape) < 2:
        return False, False
    return (rows, columns) == (shape[0], math.prod(shape[1:])), (columns, rows) == shape


def _lora_fits(adapter: _Adapter, module: str, shape: Shape, shapes: Mapping[str, Shape]) -> tuple[bool, bool]:
    if "trainable_tokens_delta" in shapes:
        return _tokens_fit(adapter, module, shape, shapes)
    if "lora_embedding_A" in shapes:
        up, down = shapes["lora_embedding_A"][::-1], shapes["lora_embedding_B"][::-1]
        return _either(shape, up[0], down[-1])[0] and up[1] == down[0], False
    if "lora_A" not in shapes:
        return False, False
    if module in adapter.parameters:
        return _expert_fits(adapter, module, adapter.parameters[module])
    up, down = shapes["lora_B"], shapes["lora_A"]
    if min(len(shape), len(up), len(down)) < 2 or up[1] != down[0]:
        return False, False
    fits = _either(shape, up[0], math.prod(down[1:]))
    if any(fits) and up[1] != rank_of(adapter.config, module):
        problem = f"has factors of rank {up[1]} for '{shown(module)}', {rank_of(adapter.config, module)} in its"
        raise adapter.refuse(f"{problem} configuration", "copy or download weights and configuration together")
    return fits


def _ia3_fits(adapter: _Adapter, module: str, shape: Shape, shapes: Mapping[str, Shape]) -> tuple[bool, bool]:
    count, forward = math.prod(shapes["ia3_l"]), is_feedforward(adapter.config, module)
    if len(shape) < 2:
        return False, False
    return count == shape[1 if forward else 0], len(shape) == 2 and count == shape[0 if forward else 1]


def _loha_fits(adapter: _Adapter, module: str, shape: Shape, shapes: Mapping[str, Shape]) -> tuple[bool, bool]:
    if not {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} <= shapes.keys():
        return False, False
    first, second = (
        _loha_shape(*(shapes.get(f"hada_{part}") for part in (f"w{n}_a", f"w{n}_b", f"t{n}"))) for n in (1, 2)
    )
    return first == second and first == (shape[0], math.prod(shape[1:])), False


def _loha_shape(left: Shape | None, right: Shape | None, core: Shape | None) -> Shape | None:
    if left is None or right is None or len(left) != 2 or len(right) != 2:
        return None
    if core is None:
        return (left[0], right[1]) if left[1] == right[0] else None
    fits = len(core) == 4 and core[:2] == (left[0], right[0])
    return (left[1], right[1] * core[2] * core[3]) if fits else None


def _lokr_fits(adapter: _Adapter, module: str, shape: Shape, shapes: Mapping[str, Shape]) -> tuple[bool, bool]:
    first, second = (_lokr_shape(shapes, number) for number in "12")
    if first is None or second is None or len(first) != 2:
        return False, False
    return (first[0] * second[0], first[1] * math.prod(second[1:])) == (shape[0], math.prod(shape[1:])), False


def _lokr_shape(shapes: Mapping[str, Shape], number: str) -> Shape | None:
    whole = shapes.get(f"lokr_w{number}")
    left, right = shapes.get(f"lokr_w{number}_a"), shapes.get(f"lokr_w{number}_b")
    core = shapes.get(f"lokr_t{number}")
    if whole is not None or left is None or right is None or len(left) != 2 or len(right) != 2:
        return whole if whole is None or len(whole) >= 2 else None
    if core is None:
        return (left[0], right[1]) if left[1] == right[0] else None
    fits = len(core) == 4 and core[:2] == (left[0], right[0])
    return (left[1], right[1], core[2], core[3]) if fits else None


def _vera_fits(adapter: _Adapter, module: str, shape: Shape, shapes: Mapping[str, Shape]) -> tuple[bool, bool]:
    rank = int(adapter.config["r"])
    if shapes.get("vera_lambda_d") != (rank,) or len(shapes.get("vera_lambda_b", ())) != 1 or len(shape) != 2:
        return False, False
    return shapes["vera_lambda_b"] == (shape[0],), shapes["vera_lambda_b"] == (shape[1],)


def _tokens_fit(adapter: _Adapter, module: str, shape: Shape, shapes: Mapping[str, Shape]) -> tuple[bool, bool]:
    trained, rows = shapes["trainable_tokens_delta"], token_rows(adapter.config, module)
    if rows is None or len(shape) != 2 or trained != (len(rows), shape[1]):
        return False, False
    return max(rows, default=0) < shape[0], False


_SHAPES: dict[str, Callable[[_Adapter, str, Shape, Mapping[str, Shape]], tuple[bool, bool]]] = {
    "LORA": _lora_fits,
    "IA3": _ia3_fits,
    "LOHA": _loha_fits,
    "LOKR": _lokr_fits,
    "VERA": _vera_fits,
    "TRAINABLE_TOKENS": _tokens_fit,
    "LN_TUNING": lambda adapter, module, shape, shapes: (False, False),
}


def _updates(adapter: _Adapter) -> dict[str, Callable[[], Update]]:
    """Tensor of the base → what makes its update, when it is first needed."""
    makers: dict[str, Callable[[str], Update]] = {
        "LORA": partial(_lora, adapter),
        "IA3": lambda module: _ia3(adapter, module, "weight"),
        "LOHA": lambda module: kinds.hadamard(adapter.parts(module), scale_of(adapter.config, module)),
        "LOKR": lambda module: kinds.kronecker(adapter.parts(module), scale_of(adapter.config, module)),
        "VERA": partial(_vera, adapter, lru_cache(maxsize=1)(partial(_projections, adapter))),
        "TRAINABLE_TOKENS": partial(_tokens, adapter),
    }
    updates: dict[str, Callable[[], Update]] = {}
    make = lru_cache(maxsize=_MOST_HELD)(makers.get(adapter.kind, lambda module: Update(lambda base, first: base)))
    for module, parts in adapter.modules.items():
        updates[adapter.tensor(module)] = partial(make, module)
        if bias := _bias_update(adapter, module, parts):
            updates[adapter.tensor(module, "bias")] = bias
    return updates


_MOST_HELD = 64  # modules whose factors are held: several threads may work on one each, and slices come in order


def _bias_update(adapter: _Adapter, module: str, parts: Mapping[str, str]) -> Callable[[], Update] | None:
    """The update of a module's bias; refuses a bias that the base lacks."""
    name = adapter.tensor(module, "bias")
    if "lora_B.bias" in parts:
        if name not in adapter.base:
            raise adapter.refuse(f"has a bias for '{shown(module)}', which the base lacks", MERGE_FIRST)
        return lambda: kinds.added(adapter.part(module, "lora_B.bias") * scale_of(adapter.config, module))
    if adapter.kind == "IA3" and not is_feedforward(adapter.config, module) and name in adapter.base:
        return lambda: _ia3(adapter, module, "bias")
    return None


def _lora(adapter: _Adapter, module: str) -> Update:
    parts, name = adapter.modules[module], adapter.tensor(module)
    if "trainable_tokens_delta" in parts:
        return _tokens(adapter, module)
    if _is_stack(adapter, module):
        return _expert_lora(adapter, module)
    factors = _lora_factors(adapter, module)
    update = kinds.low_rank(lambda: factors)
    if "lora_magnitude_vector" not in parts:
        return update
    by_column = "lora_embedding_A" in parts or adapter.turned[module]
    norms = lru_cache(maxsize=1)(partial(_column_norms, adapter, name, update)) if by_column else None
    return kinds.rescaled(update, adapter.part(module, "lora_magnitude_vector").flatten(), norms)


def _lora_factors(adapter: _Adapter, module: str) -> Factors:
    """The factors of a module's update, as its weight is stored."""
    if "lora_embedding_A" in adapter.modules[module]:
        right, left = (adapter.part(module, f"lora_embedding_{side}").T for side in "BA")
        return Factors(left * scale_of(adapter.config, module), right)
    left, right = (adapter.part(module, f"lora_{side}").flatten(1) for side in "BA")
    left = left * scale_of(adapter.config, _configured_name(adapter, module, adapter.tensor(module)))
    if start := start_of(adapter.config):
        left, right = _without_start(adapter, module, start, Factors(left, right))
    return Factors(right.T.contiguous(), left.T.contiguous()) if adapter.turned[module] else Factors(left, right)


def _without_start(adapter: _Adapter, module: str, start: str, factors: Factors) -> Factors:
    """The update from the base as it was before an initialisation took a part of it away."""
    name = adapter.tensor(module)
    spec = adapter.spec(name)
    weight = adapter.entries(name, 0, spec.numel).view(spec.shape[0], -1)
    if adapter.turned[module] and start == "olora":
        raise adapter.refuse(f"starts '{shown(module)}', a Conv1D, by olora, which peft cannot merge", "train it anew")
    turned = adapter.turned[module]
    rank = factors.down.shape[0]
    taken = kinds.start_taken(weight.T if turned else weight, start, rank)
    scale = scale_of(adapter.config, module) if start == "olora" else 1.0
    return Factors(torch.cat([factors.up, -scale * taken.up], 1), torch.cat([factors.down, taken.down]))


def _expert_lora(adapter: _Adapter, module: str) -> Update:
    name = adapter.tensor(module)
    experts = adapter.spec(name).shape[0]
    down, up = (adapter.part(module, f"lora_{side}") for side in "AB")
    down = down.reshape(experts, -1, down.shape[-1])
    up = up.reshape(up.shape[0], -1, experts).permute(2, 0, 1)
    up = up * scale_of(adapter.config, _configured_name(adapter, module, name))
    return kinds.stacked(down.mT, up.mT) if adapter.turned[module] else kinds.stacked(up, down)


def _column_norms(adapter: _Adapter, name: str, update: Update) -> Tensor:
    rows, columns = _layout(adapter.spec(name), False)
    read = lambda first, last: adapter.entries(name, first * columns, last * columns).view(-1, columns)
    return kinds.column_norms(update, read, rows, max(1, _BLOCK // max(1, columns)))


def _ia3(adapter: _Adapter, module: str, parameter: str) -> Update:
    forward = is_feedforward(adapter.config, module)
    by_row = parameter == "bias" or forward == adapter.turned[module]
    return kinds.scaled(adapter.part(module, "ia3_l").flatten(), by_row)


def _tokens(adapter: _Adapter, module: str) -> Update:
    return kinds.replaced_rows(token_rows(adapter.config, module) or [], adapter.part(module, "trainable_tokens_delta"))


def _vera(adapter: _Adapter, projections: Callable[[], tuple[Tensor, Tensor]], module: str) -> Update:
    shape = adapter.spec(adapter.tensor(module)).shape
    rows, columns = shape[::-1] if adapter.turned[module] else shape
    up, down = projections()
    left = adapter.part(module, "vera_lambda_b")[:, None] * up[:rows]
    right = adapter.part(module, "vera_lambda_d")[:, None] * down[:, :columns]
    factors = Factors(right.T.contiguous(), left.T.contiguous()) if adapter.turned[module] else Factors(left, right)
    return kinds.low_rank(lambda: factors)


def _projections(adapter: _Adapter) -> tuple[Tensor, Tensor]:
    """The random factors B and A that all modules share: stored, or drawn again from their key."""
    if set(adapter.projections) == {"A", "B"}:
        up, down = (adapter.weights[adapter.projections[side]] for side in "BA")
        return up, down
    sizes = [(adapter.spec(adapter.tensor(m)).shape, adapter.turned[m]) for m in adapter.modules]
    sizes = [shape[::-1] if turned else shape for shape, turned in sizes]
    rows, columns = (max(shape[axis] for shape in sizes) for axis in (0, 1))
    return kinds.vera_projections(int(adapter.config["r"]), rows, columns, int(adapter.config["projection_prng_key"]))


def _layout(spec: TensorSpec, stacked: bool) -> tuple[int, int]:
    """Rows and columns of a tensor, as updates see it."""
    if stacked:
        return math.prod(spec.shape[:-1]), spec.shape[-1]
    rows = spec.shape[0] if spec.shape else 1
    return rows, spec.numel // max(1, rows)


def _adapted(adapter: _Adapter, name: str, make: Callable[[], Update]) -> Entry:
    spec = adapter.spec(name)
    stacked = any(adapter.tensor(module) == name and _is_stack(adapter, module) for module in adapter.parameters)
    columns = _layout(spec, stacked)[1]
    part = lambda start, stop: _tuned(adapter, name, make().rows, columns, start, stop)
    whole = lambda: part(0, spec.numel).view(spec.shape).to(spec.dtype)
    factors = partial(_factors_of, make) if _is_low_rank(adapter, name) else None
    return Entry(spec, whole, _shared(adapter.base, name, adapter), factors, part)


def _factors_of(make: Callable[[], Update]) -> Factors:
    factors = make().factors
    assert factors is not None
    return factors()


def _shared(base: Checkpoint, name: str, adapter: _Adapter) -> Any:
    """The identity of a tied tensor, which stays tied."""
    tied = _tied(base, name)
    return (id(adapter), tied[0]) if len(tied) > 1 else None


def _is_low_rank(adapter: _Adapter, name: str) -> bool:
    """Whether an update is a product of two factors and nothing else; by its parts, before they are read."""
    module = next((m for m in adapter.modules if adapter.tensor(m) == name), None)
    if module is None or name in adapter.replaced:
        return False  # the base's tensor is not what it is added to
    parts = adapter.modules[module]
    plain = "lora_magnitude_vector" not in parts and ("lora_A" in parts or "lora_embedding_A" in parts)
    return adapter.kind == "VERA" or (adapter.kind == "LORA" and plain and not _is_stack(adapter, module))


def _tuned(adapter: _Adapter, name: str, update: kinds.RowUpdate, columns: int, start: int, stop: int) -> Tensor:
    """Entries start … stop of a tuned tensor, in float32 at least.

    It is made in blocks of rows that lie the same for every slice, so that an entry does not depend on its slice.
    """
    if start == stop or columns == 0:
        return adapter.entries(name, start, start)
    rows = max(1, _BLOCK // columns)
    count = adapter.spec(name).numel // columns
    first = start // columns // rows * rows
    blocks = []
    for begin in range(first, math.ceil(stop / columns), rows):
        end = min(begin + rows, count)
        blocks.append(update(adapter.entries(name, begin * columns, end * columns).view(-1, columns), begin))
    return torch.cat(blocks).view(-1)[start - first * columns : stop - first * columns]


def _untouched(base: Checkpoint, name: str) -> Entry:
    shape = base.specs[name].shape
    rows = shape[0] if shape else 1
    columns = base.specs[name].numel // max(1, rows)
    identity = (id(base), base.aliases.get(name, name)) if name in {*base.aliases, *base.aliases.values()} else None
    return Entry(base.specs[name], lambda: base[name], identity, lambda: Factors.none(rows, columns))
