"""A statistic of the whole model as JSON, so that a merge that resumes need not gather it again."""

from typing import Any, get_type_hints

import torch
from torch import Tensor

from suture.merging.registry import MergeMethod


def statistic_type(method: MergeMethod) -> Any:
    """The named tuple that a method gathers; None if it gathers anything else, which cannot be saved."""
    kind = get_type_hints(method.gather).get("return") if method.gather is not None else None
    return kind if hasattr(kind, "_fields") else None


def as_json(statistic: Any) -> dict[str, Any]:
    """A named tuple of tensors and numbers; every value comes back with the same bits."""
    return {field: _encoded(value) for field, value in statistic._asdict().items()}


def from_json(kind: Any, content: Any) -> Any:
    """The named tuple of this kind that `as_json` encoded; raises `ValueError` for any other content."""
    if not isinstance(content, dict) or content.keys() != set(kind._fields):
        raise ValueError(f"wanted the fields {', '.join(kind._fields)}")
    return kind(**{field: _decoded(value) for field, value in content.items()})


def _encoded(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return {"dtype": str(value.dtype).removeprefix("torch."), "values": value.tolist()}


def _decoded(value: Any) -> Any:
    match value:
        case {"dtype": "float32" | "float64" | "int64" as dtype, "values": list() as values}:
            return torch.tensor(values, dtype=getattr(torch, dtype))
        case None | int() | float():
            return value
    raise ValueError("wanted numbers and tensors")
