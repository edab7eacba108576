"""Models put together from slices of other models' layers, tensor by tensor, without copying any."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from suture.checkpoints import Checkpoint
from suture.errors import ConfigError

_LAYER = re.compile(r"(?:^|\.)(\d{1,9})\.")
_FIRST = ("embed", "embd", "wte", "wpe")  # what comes before the layers; everything else outside them comes after
_REST = ("text_decoder", "shared", "default")  # modules whose tensors do not bear their name
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


class Slice(NamedTuple):
    """Layers start … stop of a model."""

    model: Checkpoint
    start: int
    stop: int


class Origin(NamedTuple):
    """The origin of a tensor in a model made of slices: which slice, its name there, and how deep in that slice."""

    slice: int
    name: str
    depth: float


def layer_of(name: str) -> int | None:
    """The number of the layer that a tensor belongs to."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def count_layers(names: Iterable[str]) -> int:
    """Layers of a model; `ConfigError` unless they are one stack."""
    stacks: dict[str, int] = {}
    for name in names:
        if match := _LAYER.search(name):
            stack = name[: match.start(1)]
            stacks[stack] = max(stacks.get(stack, 0), int(match[1]) + 1)
    if len(stacks) != 1:
        problem = f"Slices need a model with one stack of layers; found {', '.join(sorted(stacks)) or 'no layers'}"
        raise ConfigError(f"{problem}. Remedy: merge whole models.")
    return next(iter(stacks.values()))


def origins(slices: Sequence[Slice]) -> dict[str, Origin]:
    """Every tensor of the model that the slices make, one behind the other, and where it comes from."""
    result: dict[str, Origin] = {}
    offset = 0
    for number, (model, start, stop) in enumerate(slices):
        layers = count_layers(model)
        if not 0 <= start < stop <= layers:
            raise ConfigError(f"layer_range [{start}, {stop}] does not fit '{model.label}', which has {layers} layers.")
        for name in model:
            layer = layer_of(name)
            if layer is None:
                if number == (0 if any(part in name for part in _FIRST) else len(slices) - 1):
                    result[name] = Origin(number, name, 0.0)
            elif start <= layer < stop:
                depth = (layer - start) / (stop - start - 1) if stop - start > 1 else 1.0
                result[_renumbered(name, layer - start + offset)] = Origin(number, name, depth)
        offset += stop - start
    return result


def assemble(slices: Sequence[Slice], label: str) -> Checkpoint:
    """The model that the slices make, as one checkpoint."""
    parts = [
        slices[number].model.select({name: o.name for name, o in origins(slices).items() if o.slice == number})
        for number in range(len(slices))
    ]
    return Checkpoint.joined(parts, label)


def configuration(config: Mapping[str, Any], slices: Sequence[Slice]) -> dict[str, Any]:
    """Changes to a model's configuration when it is made of slices."""
    layers = [layer for piece in slices for layer in range(piece.start, piece.stop)]
    changes: dict[str, Any] = {key: len(layers) for key in _COUNTS if key in config}
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and len(kinds) > max(layers):
        changes["layer_types"] = [kinds[layer] for layer in layers]
    return changes


def module_of(tensors: Iterable[str], modules: Sequence[str]) -> dict[str, int]:
    """The module of each tensor: the one whose name is first among the parts of the tensor's name.

    The others belong to the module `text_decoder` or `shared`, whichever there is. `ConfigError` for a tensor without a
    module, and for a module without tensors.
    """
    rest = next((number for number, name in enumerate(modules) if name in _REST), None)
    module_numbers: dict[str, int] = {}
    for tensor in tensors:
        named = (modules.index(part) for part in tensor.split(".") if part in modules)
        number = next(named, rest)
        if number is None:
            raise ConfigError(f"'{tensor}' belongs to none of the modules {', '.join(modules)}.")
        module_numbers[tensor] = number
    for number, name in enumerate(modules):
        if number not in module_numbers.values():
            raise ConfigError(f"No tensor has {name!r} in its name. Remedy: leave out modules.")
    return module_numbers


def _renumbered(name: str, layer: int) -> str:
    match = _LAYER.search(name)
    assert match is not None
    return f"{name[: match.start(1)]}{layer}{name[match.end(1) :]}"
