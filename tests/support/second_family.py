"""The reference vectors of the second family (tests/golden/second_family.*): one file, all cases."""

import json
from functools import cache
from typing import NamedTuple

from torch import Tensor

from suture.checkpoints import open_checkpoint
from tests.support.golden_cases import FOLDER

INDEX = json.loads((FOLDER / "second_family.json").read_text())


class Models(NamedTuple):
    """The inputs of a case: name → tensor of the base and of each model, and the role of every tensor."""

    base: dict[str, Tensor]
    models: dict[str, dict[str, Tensor]]
    roles: dict[str, str]


def names(kind: str, *methods: str) -> list[str]:
    """All cases of a kind, or those of some methods."""
    found = [n for n, case in INDEX.items() if case["kind"] == kind and (not methods or case.get("method") in methods)]
    assert found, f"no reference vectors of kind {kind} for {methods}"
    return found


@cache
def tensors(name: str) -> dict[str, Tensor]:
    """All tensors of one case, by the names in its file."""
    file = open_checkpoint(FOLDER / "second_family.safetensors")
    return {key.removeprefix(f"{name}:"): file[key].clone() for key in file if key.startswith(f"{name}:")}


def part(name: str, prefix: str) -> dict[str, Tensor]:
    """The tensors of one case below a prefix."""
    return {k.removeprefix(f"{prefix}/"): v for k, v in tensors(name).items() if k.startswith(f"{prefix}/")}


def inputs(name: str) -> Models:
    """The models that a case merges."""
    shared = INDEX[name].get("inputs", name)
    labels = sorted({key.split("/")[0] for key in tensors(shared) if key.startswith("model_")})
    models = {label: part(shared, label) for label in labels}
    return Models(part(shared, "base"), models, INDEX[shared].get("roles", {}) | INDEX[name].get("roles", {}))
