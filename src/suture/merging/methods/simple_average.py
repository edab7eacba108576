"""Weight average ("model soup"), https://arxiv.org/abs/2203.05482."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from suture.merging.registry import merge_method
from suture.merging.streams import weighted


@merge_method(paper="https://arxiv.org/abs/2203.05482", aliases=("weight_averaging", "weight_average"))
def simple_average(
    base: Float[Tensor, " *shape"],
    models: Float[Tensor, " task *shape"],
    *,
    weights: Sequence[float] | None = None,
    normalize: bool = True,
) -> Float[Tensor, " *shape"]:
    """Average the weights of the fine-tuned models; the pretrained weights take no part.

    `weights`: (task,) the weight of each model; `normalize=False` does not divide by their sum.

    >>> import torch
    >>> simple_average(torch.zeros(2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([2., 3.])
    """
    if weights is None:
        return models.mean(0) if normalize else models.sum(0)
    total = sum(weights)
    summed = weighted(models, weights).sum(0)
    return summed / total if normalize and abs(total) >= 1e-8 else summed
