"""What an adapter makes of each tensor of its base: updates by kind of adapter, made when they are first needed."""

import math
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from suture.checkpoints import adapter_kinds as kinds
from suture.checkpoints.adapter_configs import MERGE_FIRST, is_feedforward, scale_of, start_of, token_rows
from suture.checkpoints.adapter_kinds import Update
from suture.checkpoints.adapter_tensors import Adapter, configured_name, is_stack, tied_names
from suture.checkpoints.checkpoint import Checkpoint, Entry, Factors, TensorSpec
from suture.errors import shown

_BLOCK = 1 << 16  # entries of a tuned tensor that are made at once


def updates(adapter: Adapter) -> dict[str, Callable[[], Update]]:
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


def _bias_update(adapter: Adapter, module: str, parts: Mapping[str, str]) -> Callable[[], Update] | None:
    """What changes a module's bias; refuses a bias that the base lacks."""
    name = adapter.tensor(module, "bias")
    if "lora_B.bias" in parts:
        if name not in adapter.base:
            raise adapter.refuse(f"has a bias for '{shown(module)}', which the base lacks", MERGE_FIRST)
        return lambda: kinds.added(adapter.part(module, "lora_B.bias") * scale_of(adapter.config, module))
    if adapter.kind == "IA3" and not is_feedforward(adapter.config, module) and name in adapter.base:
        return lambda: _ia3(adapter, module, "bias")
    return None


def _lora(adapter: Adapter, module: str) -> Update:
    parts, name = adapter.modules[module], adapter.tensor(module)
    if "trainable_tokens_delta" in parts:
        return _tokens(adapter, module)
    if is_stack(adapter, module):
        return _expert_lora(adapter, module)
    factors = _lora_factors(adapter, module)
    update = kinds.low_rank(lambda: factors)
    if "lora_magnitude_vector" not in parts:
        return update
    by_column = "lora_embedding_A" in parts or adapter.turned[module]
    norms = lru_cache(maxsize=1)(partial(_column_norms, adapter, name, update)) if by_column else None
    return kinds.rescaled(update, adapter.part(module, "lora_magnitude_vector").flatten(), norms)


def _lora_factors(adapter: Adapter, module: str) -> Factors:
    """The factors of a module's update, as its weight is stored."""
    if "lora_embedding_A" in adapter.modules[module]:
        right, left = (adapter.part(module, f"lora_embedding_{side}").T for side in "BA")
        return Factors(left * scale_of(adapter.config, module), right)
    left, right = (adapter.part(module, f"lora_{side}").flatten(1) for side in "BA")
    left = left * scale_of(adapter.config, configured_name(adapter, module, adapter.tensor(module)))
    if start := start_of(adapter.config):
        left, right = _without_start(adapter, module, start, Factors(left, right))
    return Factors(right.T.contiguous(), left.T.contiguous()) if adapter.turned[module] else Factors(left, right)


def _without_start(adapter: Adapter, module: str, start: str, factors: Factors) -> Factors:
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


def _expert_lora(adapter: Adapter, module: str) -> Update:
    name = adapter.tensor(module)
    experts = adapter.spec(name).shape[0]
    down, up = (adapter.part(module, f"lora_{side}") for side in "AB")
    down = down.reshape(experts, -1, down.shape[-1])
    up = up.reshape(up.shape[0], -1, experts).permute(2, 0, 1)
    up = up * scale_of(adapter.config, configured_name(adapter, module, name))
    return kinds.stacked(down.mT, up.mT) if adapter.turned[module] else kinds.stacked(up, down)


def _column_norms(adapter: Adapter, name: str, update: Update) -> Tensor:
    rows, columns = _layout(adapter.spec(name), False)
    read = lambda first, last: adapter.entries(name, first * columns, last * columns).view(-1, columns)
    return kinds.column_norms(update, read, rows, max(1, _BLOCK // max(1, columns)))


def _ia3(adapter: Adapter, module: str, parameter: str) -> Update:
    forward = is_feedforward(adapter.config, module)
    by_row = parameter == "bias" or forward == adapter.turned[module]
    return kinds.scaled(adapter.part(module, "ia3_l").flatten(), by_row)


def _tokens(adapter: Adapter, module: str) -> Update:
    return kinds.replaced_rows(token_rows(adapter.config, module) or [], adapter.part(module, "trainable_tokens_delta"))


def _vera(adapter: Adapter, projections: Callable[[], tuple[Tensor, Tensor]], module: str) -> Update:
    shape = adapter.spec(adapter.tensor(module)).shape
    rows, columns = shape[::-1] if adapter.turned[module] else shape
    up, down = projections()
    left = adapter.part(module, "vera_lambda_b")[:, None] * up[:rows]
    right = adapter.part(module, "vera_lambda_d")[:, None] * down[:, :columns]
    factors = Factors(right.T.contiguous(), left.T.contiguous()) if adapter.turned[module] else Factors(left, right)
    return kinds.low_rank(lambda: factors)


def _projections(adapter: Adapter) -> tuple[Tensor, Tensor]:
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


def adapted(adapter: Adapter, name: str, make: Callable[[], Update]) -> Entry:
    spec = adapter.spec(name)
    stacked = any(adapter.tensor(module) == name and is_stack(adapter, module) for module in adapter.parameters)
    columns = _layout(spec, stacked)[1]
    part = lambda start, stop: _tuned(adapter, name, make().rows, columns, start, stop)
    whole = lambda: part(0, spec.numel).view(spec.shape).to(spec.dtype)
    factors = partial(_factors_of, make) if _is_low_rank(adapter, name) else None
    return Entry(spec, whole, _shared(adapter.base, name, adapter), factors, part)


def _factors_of(make: Callable[[], Update]) -> Factors:
    factors = make().factors
    assert factors is not None
    return factors()


def _shared(base: Checkpoint, name: str, adapter: Adapter) -> Any:
    """The identity of a tied tensor, which stays tied."""
    tied = tied_names(base, name)
    return (id(adapter), tied[0]) if len(tied) > 1 else None


def _is_low_rank(adapter: Adapter, name: str) -> bool:
    """Whether an update is a product of two factors and nothing else; by its parts, before they are read."""
    module = next((m for m in adapter.modules if adapter.tensor(m) == name), None)
    if module is None or name in adapter.replaced:
        return False  # the base's tensor is not what it is added to
    parts = adapter.modules[module]
    plain = "lora_magnitude_vector" not in parts and ("lora_A" in parts or "lora_embedding_A" in parts)
    return adapter.kind == "VERA" or (adapter.kind == "LORA" and plain and not is_stack(adapter, module))


def _tuned(adapter: Adapter, name: str, update: kinds.RowUpdate, columns: int, start: int, stop: int) -> Tensor:
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
