"""The result of one merge, as the stages of a run pass it on."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from suture.adaptation import AdaMergingResult
from suture.repairs import RepairResult


@dataclass(frozen=True)
class MergeResult:
    """One merged model: its tensors, and its learned coefficients, if any. `label` names its row in the report.

    `masked`: the models of the tasks, where the method leaves more than one model.
    """

    label: str
    tensors: Mapping[str, Tensor]
    learned: AdaMergingResult | None = None
    masked: RepairResult | None = None
