"""Static merges as classes, thin wrappers of `merge`."""

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from suture.fusionbench.pools import split_pool
from suture.merging.merge import merge
from suture.merging.registry import get_method


class _StaticAlgorithm:
    """One method with its knobs, to run on pools of modules."""

    method: ClassVar[str]

    def __init__(self, **knobs: Any):
        self.knobs = get_method(self.method).knobs.validate(knobs)

    @torch.no_grad()
    def run(self, modelpool: Mapping[str, nn.Module]) -> nn.Module:
        """Merge modules of one architecture into a new one; the pool's modules are not changed.

        `modelpool` maps names to modules, the pretrained one under `_pretrained_`. Raises `ConfigError` without it and
        `IncompatibleModels` for modules that do not fit together.
        """
        base, models = split_pool(modelpool)
        result = copy.deepcopy(base)
        result.load_state_dict(merge(base, models, self.method, **self.knobs), strict=False)
        return result


class SimpleAverageAlgorithm(_StaticAlgorithm):
    """Weight average of the fine-tuned models (https://arxiv.org/abs/2203.05482)."""

    method = "simple_average"


class TaskArithmeticAlgorithm(_StaticAlgorithm):
    """Task Arithmetic (https://arxiv.org/abs/2212.04089); `scaling_factor` is λ.

    >>> base, tuned = nn.Linear(2, 2), nn.Linear(2, 2)
    >>> merged = TaskArithmeticAlgorithm(scaling_factor=1.0).run({"_pretrained_": base, "tuned": tuned})
    >>> bool((merged.weight - tuned.weight).abs().max() < 1e-6)
    True
    """

    method = "task_arithmetic"


class TiesMergingAlgorithm(_StaticAlgorithm):
    """TIES-Merging (https://arxiv.org/abs/2306.01708); the knobs are those of `suture.methods()["ties_merging"]`."""

    method = "ties_merging"
