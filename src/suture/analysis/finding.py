"""What an analysis found: a table of rows, the numbers as tensors, and the words for them."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Finding:
    """`rows` are the table under `heads`; `values` the same numbers as tensors; `labels` name their axes.

    `save` writes both and the figure; `suture.analysis.figures` paints and prints.
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
        known = lambda value: None if isinstance(value, float) and not math.isfinite(value) else value
        rows = [dict(zip(self.heads, map(known, row), strict=True)) for row in self.rows]
        return {"analysis": self.name, "title": self.title, "rows": rows, "notes": list(self.notes)}

    def save(self, folder: str | Path) -> Path:
        """Write NAME.json, NAME.csv, NAME.png and NAME.svg into a folder, which is made; returns it."""
        from suture.analysis.figures import draw

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.name}.json").write_text(json.dumps(self.as_data(), indent=2) + "\n", "utf-8")
        with (folder / f"{self.name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([self.heads, *self.rows])
        draw(self, folder)
        return folder
