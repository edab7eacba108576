"""The result of one merge, as the stages of a run hand it on."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from suture.adaptation import AdaMergingResult


@dataclass(frozen=True)
class MergeResult:
    """One merged model: its tensors, and how its coefficients were learned, if they were. `label` names its row."""

    label: str
    tensors: Mapping[str, Tensor]
    learned: AdaMergingResult | None = None
