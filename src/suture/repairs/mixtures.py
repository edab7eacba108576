"""Mixtures of a task's own inputs, for a student that is to follow its teacher between them.

https://arxiv.org/abs/1710.09412, https://arxiv.org/abs/2106.05237
"""

from typing import Any

import torch
from torch import Tensor

from suture.core.batches import size
from suture.core.random import generator_for
from suture.errors import ConfigError


def with_mixtures(inputs: Any, count: int, task: str, seed: int) -> Any:
    """The inputs (N, …), and `count` mixtures of each: (N · (1 + count), …), in the same dtype.

    A mixture is λ x + (1 − λ) x′, λ uniform in [0, 1], x′ another input, chosen by a permutation of all. Raises
    `ConfigError` for inputs that cannot be mixed: those that are not one tensor of numbers or bytes.
    """
    if not count:
        return inputs
    if not isinstance(inputs, Tensor) or not (inputs.is_floating_point() or inputs.dtype == torch.uint8):
        kind = str(inputs.dtype).removeprefix("torch.") if isinstance(inputs, Tensor) else type(inputs).__name__
        raise ConfigError(
            f"mixed={count}: the inputs of task {task!r} are {kind}, which has nothing between two of them; wanted "
            "pixels or other real numbers. Remedy: mixed=0."
        )
    generator = generator_for(seed, f"{task}/mixtures")
    result = inputs.new_empty(size(inputs) * (1 + count), *inputs.shape[1:])
    first, *others = result.split(size(inputs))
    first.copy_(inputs)
    for part in others:
        other = inputs[torch.randperm(size(inputs), generator=generator).to(inputs.device)]
        share = torch.rand(size(inputs), generator=generator).to(inputs.device).view(-1, *[1] * (inputs.dim() - 1))
        mixture = share * inputs + (1 - share) * other
        part.copy_(mixture.round() if inputs.dtype == torch.uint8 else mixture)
    return result
