"""Weight average ("model soup"), https://arxiv.org/abs/2203.05482."""

from jaxtyping import Float
from torch import Tensor

from suture.methods.registry import merge_method


@merge_method(paper="https://arxiv.org/abs/2203.05482", aliases=("weight_averaging", "weight_average"))
def simple_average(base: Float[Tensor, " *shape"], models: Float[Tensor, " task *shape"]) -> Float[Tensor, " *shape"]:
    """Average the weights of the fine-tuned models; the pretrained weights take no part.

    >>> import torch
    >>> simple_average(torch.zeros(2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([2., 3.])
    """
    return models.mean(0)
