"""The result of one merge, as the stages of a run pass it on."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from suture.adaptation import AdaMergingResult
from suture.repairs import RepairResult


@dataclass(frozen=True)
class MergeResult:
    """One merged model: its tensors, and its learned coefficients, if any. `label` names its row in the report.

    `how` says in words what was learned, and from which inputs, which are of the `split`; both are empty where only
    weights were read. `seconds`
    is the time that the merge took, and `warnings` are lines for the user. `masked`: the models of the tasks, where
    the method leaves more than one model.
    """

    label: str
    tensors: Mapping[str, Tensor]
    learned: AdaMergingResult | None = None
    how: str = ""
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()
    masked: RepairResult | None = None
    split: str = ""
