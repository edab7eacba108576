"""The results of the stages of a run: one merge, one method with its repairs, and the whole run."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from suture.adaptation import AdaMergingResult
from suture.errors import ConfigError
from suture.repairs import RepairResult
from suture.reporting import Report
from suture.reporting.chart import Chart
from suture.reporting.figures import chart_of_run

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class MergeResult:
    """One merged model: its tensors, and its learned coefficients, if any. `label` names its row in the report.

    `how` says in words what was learned, and from which inputs, which are of the `split`; both are empty where only
    weights were read. `seconds` is the time that the merge took, `memory` the process's peak during it in bytes, if it
    is known, and `warnings` are lines for the user. `masked`: the models of the tasks, where the method leaves more
    than one model.
    """

    label: str
    tensors: Mapping[str, Tensor]
    learned: AdaMergingResult | None = None
    how: str = ""
    seconds: float = 0.0
    memory: int | None = None
    warnings: tuple[str, ...] = ()
    masked: RepairResult | None = None
    split: str = ""


@dataclass(frozen=True)
class Outcome:
    """One method of a run: its merged model, the repairs of it, the folder they are written into, and notes on that."""

    merged: MergeResult
    repairs: Sequence[RepairResult]
    folder: Path
    notes: Sequence[str] = ()

    @property
    def label(self) -> str:
        """The name of the merge in the report."""
        return self.merged.label

    @property
    def named_repairs(self) -> dict[str, RepairResult]:
        """Every repair, by the names of the merge and of the kinds up to it."""
        return {" + ".join((self.label, *fitted.chain)): fitted for fitted in self.repairs}

    @property
    def lines(self) -> Iterator[str]:
        """Notes and warnings for the user."""
        yield from self.notes
        yield from self.merged.warnings
        for fitted in self.repairs:
            yield from fitted.warnings

    def chosen(self, how: str, split: str) -> "Outcome":
        """The same, saying how the method's knobs were chosen, and on which split, unless the merge saw one itself."""
        how, split = "; ".join(filter(None, (how, self.merged.how))), self.merged.split or split
        return replace(self, merged=replace(self.merged, how=how, split=split))


@dataclass(frozen=True)
class RunResult:
    """One finished run: its folder and its report.

    `unchanged`: the folder had this result already; then `report` is None.
    """

    folder: Path
    report: Report | None = None
    unchanged: bool = False

    def __repr__(self) -> str:
        content = "unchanged" if self.report is None else f"{len(self.report.rows)} models"
        return f"{type(self).__name__}({str(self.folder)!r}, {content})"

    def to_pandas(self) -> "DataFrame":
        """The accuracy table: one row for each model."""
        return self._known.to_pandas()

    def plot(self, figure: str = "accuracy") -> Chart:
        """One of the report's figures, which a notebook shows; raises `ConfigError` with the names of those it has."""
        return chart_of_run(self.folder, figure)

    def _repr_html_(self) -> str:
        where = escape(str(self.folder))
        return (self.report._repr_html_() if self.report else "") + f"<p>The report and all models are in {where}</p>"

    @property
    def _known(self) -> Report:
        if self.report is None:
            raise ConfigError(f"The run in '{self.folder}' was finished before. Remedy: read its report.json.")
        return self.report
