"""The tensors of an adapter, sorted: parts of each module's update, and what stands in for tensors of the base."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from suture.checkpoints.adapter_configs import MERGE_FIRST, rank_of
from suture.checkpoints.checkpoint import Checkpoint, TensorSpec
from suture.checkpoints.json_files import model_config
from suture.errors import CheckpointError, refusal, shown

PREFIX = "base_model.model."
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
_PROJECTIONS = {"base_model.vera_A": "A", "base_model.vera_B": "B"}
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


#: Names → the base's names of those that an adapter calls otherwise.
Naming = Callable[[Iterable[str]], Mapping[str, str]]


@dataclass
class Adapter:
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


def tie_of(base: Checkpoint, name: str) -> dict[str, str]:
    """All names that a tensor is tied under → those that the base stores, the head of its configuration included."""
    head = tied_head(base)
    names = set(tied_names(base, head.get(name, name)))
    group = {each: each for each in names if each in base}
    return group | {each: stored for each, stored in head.items() if stored in names}


def tied_head(base: Checkpoint) -> dict[str, str]:
    """The head that a base does not store because its configuration ties it: its name, and that of the embedding."""
    if "lm_head.weight" in base or not model_config(base.directory).get("tie_word_embeddings"):
        return {}
    tables = [name for name in base if name.rpartition(".")[0].endswith(("embed_tokens", "wte", "word_embeddings"))]
    return {"lm_head.weight": tables[0]} if len(tables) == 1 else {}


def check_tie(adapter: Adapter, name: str) -> None:
    """Refuse an update of one name of a tied tensor: peft trains it alone, and its merge would change both."""
    tied = sorted(tie_of(adapter.base, name).keys() - {name})
    trained = any("trainable_tokens_delta" in parts for parts in adapter.modules.values())
    if tied and not trained:
        found = f"adapts '{shown(name)}', which the base ties to '{shown(tied[0])}': peft trains the one alone"
        raise adapter.refuse(found, "merge files (suture merge …), whose result has both, or untie them in the base")


def tied_names(base: Checkpoint, name: str) -> list[str]:
    """All names of a tensor, of which the adapter may have used any."""
    first = base.aliases.get(name, name)
    return [first, *(alias for alias, canonical in base.aliases.items() if canonical == first)]


def sort_out(adapter: Adapter) -> None:
    """Sort the stored tensors: parts of a module's update, and tensors that replace the base's."""
    known = "|".join(_PARTS[adapter.kind])
    pattern = re.compile(rf"(.+)\.({known})(?:\.(?!weight$|bias$)[^.]+)?(\.weight|\.bias)?") if known else None
    for stored in adapter.weights:
        if adapter.kind == "VERA" and stored in _PROJECTIONS:
            adapter.projections[_PROJECTIONS[stored]] = stored
            continue
        match = pattern.fullmatch(stored.removeprefix(PREFIX)) if pattern else None
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


def _replaced_name(stored: str, adapter: Adapter) -> str:
    """The base's name of a tensor that an adapter holds whole; refuses what belongs to another kind of adapter."""
    name = stored.removeprefix(PREFIX)
    for part, what in _OTHERS.items():
        if any(each.startswith(part) for each in name.split(".")):
            raise adapter.refuse(f"holds '{shown(stored)}', {what}, which is not read here", MERGE_FIRST)
    name = re.sub(r"\.ln_tuning_layers(\.[^.]+)?(?=\.(weight|bias)$)", "", name)
    return re.sub(r"\.(modules_to_save|base_layer|token_adapter)\b", "", name)


def find_in_base(adapter: Adapter, canonical_names: Naming | None) -> None:
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
            if f"{module}.weight" in tied_head(adapter.base):
                found = f"adapts '{shown(module)}.weight', which the base ties to its embedding and does not store"
                raise adapter.refuse(found, "merge files (suture merge …), whose result has both")
            found = f"adapts '{shown(module)}.weight', which the base lacks"
            raise adapter.refuse(found, "give the base it was trained on")


def _parameters(adapter: Adapter) -> dict[str, str]:
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


def _all_fit(adapter: Adapter, modules: Sequence[str], names: Sequence[str]) -> bool:
    return all(any(expert_fits(adapter, module, name)) for module, name in zip(modules, names, strict=True))


def expert_fits(adapter: Adapter, module: str, name: str) -> tuple[bool, bool]:
    """Whether factors have the shape of a parameter: as (out, in), and as (in, out)."""
    up, down = (adapter.weights.specs[adapter.modules[module][side]].shape for side in ("lora_B", "lora_A"))
    shape = adapter.base.specs[name].shape
    if len(shape) not in (2, 3) or len(up) != 2 or len(down) != 2:
        return False, False
    experts = shape[0] if len(shape) == 3 else 1
    if up[1] != down[0] or down[0] != experts * rank_of(adapter.config, configured_name(adapter, module, name)):
        return False, False
    return shape[-2:] == (up[0], down[1]), len(shape) == 3 and shape[-2:] == (down[1], up[0])


def configured_name(adapter: Adapter, module: str, name: str) -> str:
    """The name that the patterns of the configuration speak of: a module's, or a targeted parameter's."""
    owner = re.sub(r"(\.base_layer)+$", "", module)
    return f"{owner}.{name.rpartition('.')[2]}" if module in adapter.parameters or owner != module else module


def is_stack(adapter: Adapter, module: str) -> bool:
    """Whether a module's update is that of fused experts."""
    return module in adapter.parameters and len(adapter.spec(adapter.parameters[module]).shape) == 3
