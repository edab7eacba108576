"""The common part of the methods for `method=…` that are more than one registered merge of weights."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from suture.pipeline.repairs import Repair


@dataclass(frozen=True, kw_only=True)
class MethodBase:
    """A method whose knobs are its fields, without a registered merge, frozen tensors or repairs of its own."""

    static = None
    frozen = ()

    @property
    def knobs(self) -> dict[str, Any]:
        """Every knob with its value."""
        return asdict(self)

    @property
    def repairs(self) -> tuple[Repair, ...]:
        """No repairs: they are chosen with `repair=…`, and follow the merged model."""
        return ()


def written(merged: Mapping[str, Tensor], out: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
    """The merged tensors, copied into `out` if that is given."""
    if out is None:
        return merged
    for name, tensor in merged.items():
        out[name].copy_(tensor)
    return out
