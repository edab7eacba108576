"""AdaMerging as classes: for any modules, with hooks for data and logits, or for pools of CLIP models."""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from suture.adaptation import AdaMergingResult, adapt, save_coefficients
from suture.errors import ConfigError, check_known
from suture.fusionbench.pools import split_pool
from suture.pipeline.methods import Method, chosen_method
from suture.pipeline.pipeline import merge_in_memory
from suture.pipeline.pools import ModelPool, TaskPool
from suture.pipeline.settings import Settings

_KNOBS = {
    "optimizer": "adam",
    "lr": 1e-3,
    "init_values": 0.3,
    "clamp_weights": False,
    "max_steps": 1000,
    "objective": "entropy",
    "plus_plus": False,
    "frozen_parameters": "base",
    "weights": None,
    "save_merging_weights": None,
}


class _AdaMergingAlgorithm:
    """AdaMerging of a mapping of modules. A subclass provides the inputs; `run(modelpool)` returns the merged module.

    The knobs are those of `suture.adapt`, and three more. `weights` are fixed coefficients, which are not adapted.
    `save_merging_weights` names a file for the learned ones. `frozen_parameters` concerns parameters of the pretrained
    module without `requires_grad`, and floating-point buffers such as BatchNorm's running statistics: "base", as in
    FusionBench, leaves them at the pretrained values, without a coefficient; "merge" merges them like the others, as
    `suture.adapt` does. After a run, `result` has the coefficients with their history.
    """

    granularity: ClassVar[str]

    def __init__(self, **knobs: Any):
        check_known(f"knob of {type(self).__name__}", knobs, _KNOBS)
        self.knobs = _KNOBS | knobs
        self.result: AdaMergingResult | None = None

    def on_test_time_adaptation_start(self) -> None:
        """Called once before the first step, to set up loaders and heads."""

    def get_shuffled_test_loader_iter(self, task: str) -> Iterator[Any]:
        """Endless batches of one task's unlabelled inputs; see `InfiniteDataLoader`."""
        raise NotImplementedError(f"{type(self).__name__}.get_shuffled_test_loader_iter says where inputs come from.")

    def compute_logits(self, module: nn.Module, batch: Any, task: str) -> Tensor:
        """Logits (batch, class) of the merged module for one task's batch."""
        return module(batch)

    def run(self, modelpool: Mapping[str, nn.Module]) -> nn.Module:
        """Adapt modules of one architecture, `_pretrained_` among them, and merge them into a new one."""
        base, models = split_pool(modelpool)
        knobs = dict(self.knobs)
        weights, save_as = knobs.pop("weights"), knobs.pop("save_merging_weights")
        frozen = _frozen(base, knobs.pop("frozen_parameters"))
        if weights is not None:
            knobs |= {"init_values": weights, "max_steps": 0}
        batches = {}
        if knobs["max_steps"]:
            self.on_test_time_adaptation_start()
            batches = {task: self.get_shuffled_test_loader_iter(task) for task in models}
        knobs |= {"granularity": self.granularity, "frozen": frozen}
        self.result = adapt(base, base, models, batches, self.compute_logits, **knobs)
        if save_as is not None:
            save_coefficients(self.result.coefficients, Path(save_as))
        merged = copy.deepcopy(base)
        merged.load_state_dict(self.result.merged, strict=False)
        return merged


def _frozen(base: nn.Module, choice: str) -> list[str]:
    """The names of the tensors that stay at the base."""
    if choice not in ("base", "merge"):
        raise ConfigError(f"frozen_parameters={choice!r}: wanted 'base' or 'merge'.")
    tensors = {n: t for n, t in base.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    frozen = [n for n, t in tensors.items() if t.is_floating_point() and not t.requires_grad]
    if choice == "merge":
        return []
    if not any(t.requires_grad for t in tensors.values()):
        raise ConfigError(
            "No parameter of the pretrained module asks for a gradient, so nothing would be merged. "
            "Remedy: module.requires_grad_(), or frozen_parameters='merge'."
        )
    return frozen


class TaskWiseAdaMergingAlgorithm(_AdaMergingAlgorithm):
    """AdaMerging with one coefficient per task (https://arxiv.org/abs/2310.02575, equation 4).

    >>> import torch
    >>> class Mine(TaskWiseAdaMergingAlgorithm):
    ...     def get_shuffled_test_loader_iter(self, task):
    ...         while True:
    ...             yield torch.eye(2)
    >>> pool = {name: nn.Linear(2, 2) for name in ("_pretrained_", "first", "second")}
    >>> merged = Mine(max_steps=2).run(pool)
    """

    granularity = "task"


class LayerWiseAdaMergingAlgorithm(_AdaMergingAlgorithm):
    """AdaMerging with one coefficient per task and parameter tensor (https://arxiv.org/abs/2310.02575, equation 6).

    >>> import torch
    >>> class Mine(LayerWiseAdaMergingAlgorithm):
    ...     def get_shuffled_test_loader_iter(self, task):
    ...         while True:
    ...             yield torch.eye(2)
    >>> pool = {name: nn.Linear(2, 2) for name in ("_pretrained_", "first", "second")}
    >>> merged = Mine(max_steps=2).run(pool)
    """

    granularity = "layer"


class _CLIPAdaMergingAlgorithm:
    """AdaMerging of a pool of CLIP vision towers on the tasks of a task pool; the knobs are those of `adamerging`."""

    method: ClassVar[str]

    def __init__(self, **knobs: Any):
        self.chosen = chosen_method(self.method, knobs)
        self.result: AdaMergingResult | None = None

    def run(self, modelpool: Any, taskpool: Any) -> nn.Module:
        """The merged encoder, pixels → features. Pools are `ModelPool` and `TaskPool`, or mappings as in their YAML."""
        models, merged, _ = merge_in_memory(_settings(modelpool, taskpool, self.chosen))
        self.result = merged.learned
        return models.new_encoder().load(merged.tensors)


class CLIPLayerWiseAdaMergingSurgeryAlgorithm:
    """Layer-wise AdaMerging, then Representation Surgery; the knobs are those of `surgery/adamerging_surgery`."""

    def __init__(self, **knobs: Any):
        self.chosen = chosen_method("surgery/adamerging_surgery", knobs)

    def run(self, modelpool: Any, taskpool: Any) -> dict[str, nn.Module]:
        """{"adamerging": the merged encoder, "surgery": the repaired one, a `SurgeryModel`}."""
        models, merged, (surgery,) = merge_in_memory(_settings(modelpool, taskpool, self.chosen))
        return {"adamerging": models.new_encoder().load(merged.tensors), "surgery": surgery.model}


class CLIPTaskWiseAdaMergingAlgorithm(_CLIPAdaMergingAlgorithm):
    """Task-wise AdaMerging of CLIP vision towers."""

    method = "clip_task_wise_adamerging"


class CLIPLayerWiseAdaMergingAlgorithm(_CLIPAdaMergingAlgorithm):
    """Layer-wise AdaMerging of CLIP vision towers."""

    method = "clip_layer_wise_adamerging"


def _settings(modelpool: Any, taskpool: Any, method: Method) -> Settings:
    """Settings of a run without an output folder, from pools, mappings of their YAML, or drop-in classes of pools."""
    pool, tasks = getattr(modelpool, "pool", modelpool), getattr(taskpool, "pool", taskpool)
    pool = pool if isinstance(pool, ModelPool) else ModelPool.from_config(pool)
    tasks = tasks if isinstance(tasks, TaskPool) else TaskPool.from_config(tasks)
    return Settings(pool, tasks, method, Path("outputs"), method.repairs)
