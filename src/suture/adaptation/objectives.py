"""Objectives of AdaMerging: the entropy of the model's predictions, or the distance to the task's expert.

An objective is a scalar for one task's batch, a mean over the batch; the loop adds them up over tasks. Objectives on
logits raise `ConfigError` unless these are (batch, class) with two classes or more.
Entropy: https://arxiv.org/abs/2310.02575, equation 5.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from suture.errors import ConfigError, check_known


def entropy(logits: Tensor) -> Float[Tensor, ""]:
    """−Σ p·log p in nats, p = softmax(logits (batch, class)), mean over the batch; exact for logits of any size.

    >>> entropy(torch.zeros(3, 4)).exp()
    tensor(4.)
    """
    _check_logits(logits)
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()


def entropy_loss(logits: Tensor) -> Float[Tensor, ""]:
    """`entropy_epsilon` under its name in FusionBench."""
    return entropy_epsilon(logits)


def entropy_epsilon(logits: Tensor) -> Float[Tensor, ""]:
    """−Σ p·log(p + 1e-8) in nats, as in FusionBench: slightly below `entropy`."""
    _check_logits(logits)
    probabilities = logits.softmax(-1)
    return -(probabilities * torch.log(probabilities + 1e-8)).sum(-1).mean()


def expert_cross_entropy(logits: Tensor, expert: Tensor) -> Float[Tensor, ""]:
    """Cross-entropy in nats to the class that the task's expert predicts for the same input."""
    _check_logits(logits)
    return F.cross_entropy(logits, expert.argmax(-1))


def expert_kl(logits: Tensor, expert: Tensor) -> Float[Tensor, ""]:
    """KL divergence in nats of the model's predictions from the expert's, Σ p_expert·log(p_expert / p), batch mean."""
    _check_logits(logits)
    return F.kl_div(logits.log_softmax(-1), expert.log_softmax(-1), log_target=True, reduction="batchmean")


def expert_feature_l1(features: Float[Tensor, " *shape"], expert: Float[Tensor, " *shape"]) -> Float[Tensor, ""]:
    """Mean absolute difference to the expert's features, over batch and dimensions."""
    return (features - expert).abs().mean()


def _check_logits(logits: Tensor) -> None:
    shape = tuple(logits.shape)
    if len(shape) != 2:
        raise ConfigError(
            f"The objective takes logits (batch, class); found the shape {shape}. Remedy: let `forward` or `logits` "
            "give a row for each prediction; for (batch, class, height, width): logits.movedim(1, -1).flatten(0, -2)."
        )
    if shape[1] < 2:
        raise ConfigError(
            f"The objective takes logits of two classes or more; found the shape {shape}, whose softmax is constant. "
            "Remedy: for one logit z let `logits` give torch.cat([torch.zeros_like(z), z], 1)."
        )


@dataclass(frozen=True)
class Objective:
    """A loss for one task's batch: `function(output)`, or `function(output, expert's output)` if `expert` is set.

    `of` names the output: the logits, or the features, which are the module's output before any head.
    """

    function: Callable[..., Tensor]
    of: Literal["logits", "features"] = "logits"
    expert: bool = False


OBJECTIVES = {
    "entropy": Objective(entropy),
    "entropy_epsilon": Objective(entropy_epsilon),
    "expert_cross_entropy": Objective(expert_cross_entropy, expert=True),
    "expert_kl": Objective(expert_kl, expert=True),
    "expert_feature_l1": Objective(expert_feature_l1, of="features", expert=True),
}


def get_objective(objective: str | Objective) -> Objective:
    """The objective of this name, or the one given; `ConfigError` for an unknown name."""
    if isinstance(objective, Objective):
        return objective
    check_known("objective", [objective], OBJECTIVES)
    return OBJECTIVES[objective]
