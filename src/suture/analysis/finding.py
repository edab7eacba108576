"""The result of an analysis: a table of rows, and the same numbers as tensors."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Finding:
    """`rows` are the table under `heads`; `values` the same numbers as tensors; `labels` name their axes.

    `suture.analysis.save(finding, folder)` writes both, and the figure.
    """

    name: str
    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Any]]
    values: Mapping[str, Tensor]
    labels: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def as_data(self) -> dict[str, Any]:
        """As JSON can hold it; what is not finite is null."""
        rows = [dict(zip(self.heads, map(_finite, row), strict=True)) for row in self.rows]
        return {"analysis": self.name, "title": self.title, "rows": rows, "notes": list(self.notes)}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
