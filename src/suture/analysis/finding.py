"""The result of an analysis: a table of rows, and the same numbers as tensors."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from suture.core.discovery import import_all
from suture.core.notebooks import frame, table_html

if TYPE_CHECKING:
    from pandas import DataFrame

    from suture.reporting.chart import Chart

D = TypeVar("D", bound="Callable[[Finding], Chart]")
_CHARTS: dict[str, "Callable[[Finding], Chart]"] = {}


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

    def __repr__(self) -> str:
        return f"Finding({self.name!r}: {self.title}, {len(self.rows)} rows)"

    def to_pandas(self) -> "DataFrame":
        """The table, with its first column as the index."""
        return frame(self.heads, self.rows, index=self.heads[0])

    def plot(self) -> "Chart":
        """The figure, which a notebook shows."""
        import_all("suture.analysis")
        return _CHARTS[self.name](self)

    def _repr_html_(self) -> str:
        return table_html(self.heads, self.rows, self.title)

    def as_data(self) -> dict[str, Any]:
        """The table as JSON data, with null for values that are not finite."""
        rows = [dict(zip(self.heads, map(finite, row), strict=True)) for row in self.rows]
        return {"analysis": self.name, "title": self.title, "rows": rows, "notes": list(self.notes)}


def finite(value: Any) -> Any:
    """The value, or None for a number that is not finite: a tensor that is zero in the base has no relative norm."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def draws(name: str) -> Callable[[D], D]:
    """Register the decorated function as the chart of the analysis of this name."""

    def register(draw: D) -> D:
        _CHARTS[name] = draw
        return draw

    return register
