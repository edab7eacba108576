"""The result of an analysis: a table of rows, and the same numbers as tensors."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Finding:
    """The result of one analysis: `rows` form a table with `heads`; `values` are the same numbers as tensors.

    `labels` name the tensors' axes. `suture.analysis.save(finding, folder)` writes the table and the figure.
    """

    name: str
    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Any]]
    values: Mapping[str, Tensor]
    labels: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def as_data(self) -> dict[str, Any]:
        """The table as JSON data, with null for values that are not finite."""
        rows = [dict(zip(self.heads, map(finite, row), strict=True)) for row in self.rows]
        return {"analysis": self.name, "title": self.title, "rows": rows, "notes": list(self.notes)}


def finite(value: Any) -> Any:
    """The value, or None for a number that is not finite: a tensor that is zero in the base has no relative norm."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
