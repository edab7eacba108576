"""SVC: calibration of a merge's singular values, https://arxiv.org/abs/2602.05536"""

from typing import Annotated

import torch
from annotated_types import Gt, Le
from jaxtyping import Float
from torch import Tensor

from suture.merging.spectra import NEGLIGIBLE, leading
from suture.merging.wrapping import merge_wrapper

_LEAST = 1e-12  # of ‖a‖²: a task without this direction agrees with nothing


@merge_wrapper(paper="https://arxiv.org/abs/2602.05536", matrices=True)
def svc(
    update: Float[Tensor, "out inner"],
    deltas: Float[Tensor, "task out inner"],
    *,
    alpha: Annotated[float, Gt(0), Le(1)] = 0.1,
) -> Float[Tensor, "out inner"]:
    """Divide each singular value of a merged update by how much the tasks themselves have along its left vector.

    With M = Σ σ u vᵀ, a = uᵀM and a_t = uᵀΔ_t it becomes σ · T / Σ max(`alpha`, ⟨a, a_t⟩/‖a_t‖²). With `alpha=1`, for
    TSV-M and WUDI, it can only shrink. Smaller ones, 0.1 for Task Arithmetic, TIES and Iso-C and 0.2 for Iso-CTS, also
    amplify: until they act, the result does not depend on the scale of the update. Where singular values are equal, as
    all of Iso-C's are, their vectors and so the result are not determined.

    >>> svc(torch.tensor([[1.0]]), torch.tensor([[[2.0]], [[4.0]]])).round(decimals=4).float()  # 2 / (1/2 + 1/4)
    tensor([[2.6667]])
    """
    update = update.double()
    left, values, right = leading(update, min(update.shape), NEGLIGIBLE * float(update.norm()))
    rows = values[:, None] * right.mT
    agreement = torch.zeros_like(values)
    for delta in deltas:
        own = left.mT @ delta.double()
        agreement += ((rows * own).sum(1) / own.square().sum(1).clamp_min(_LEAST)).clamp_min(alpha)
    return left * (len(deltas) / agreement) @ rows
