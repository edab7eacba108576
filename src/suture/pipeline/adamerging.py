"""The method `adamerging`: AdaMerging of a pool's encoders, on the inputs and heads of a task pool."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from suture.adaptation import AdaMergingResult, adapt, layout
from suture.adaptation.coefficients import initial_values
from suture.adaptation.feature_norm import FeatureNorm, feature_norms
from suture.adaptation.merged_model import matched_tensors
from suture.adaptation.options import AdaMergingOptions
from suture.adaptation.schedules import Schedule
from suture.core.batches import ShuffledBatches
from suture.errors import SutureError
from suture.evaluation import SplitInputs
from suture.pipeline.context import FEW, Context
from suture.pipeline.method_base import MethodBase, written
from suture.pipeline.models import Models
from suture.pipeline.repairs import Repair
from suture.pipeline.results import MergeResult

#: Name → (granularity, whether the task vectors are those of AdaMerging++).
NAMES: dict[str, tuple[str, bool]] = {
    "layer_wise_adamerging": ("layer", False),
    "clip_layer_wise_adamerging": ("layer", False),
    "lw_adamerging": ("layer", False),
    "task_wise_adamerging": ("task", False),
    "clip_task_wise_adamerging": ("task", False),
    "tw_adamerging": ("task", False),
    "lw_adamergingpp": ("layer", True),
    "tw_adamergingpp": ("task", True),
}
COMPARED = 64  # inputs of each task whose feature norms are compared with the experts'
_FASTER = 5  # the fast schedule reaches as far in a fifth of the steps
_WITHOUT_EFFECT = {"cache_dir", "devices", "eval_iterations", "num_workers", "save_merging_weights", "strict"}
_OPTIONS = {each.name for each in fields(AdaMergingOptions)}


@dataclass(frozen=True, kw_only=True)
class AdaMerging(MethodBase, AdaMergingOptions):
    """Learn the coefficients of the task vectors by minimising the entropy on unlabelled inputs.

    `name` implies a granularity, and AdaMerging++ or not; `granularity` and `plus_plus` override it. `weights` (a list,
    .npy, .pt or .safetensors) are fixed coefficients, which are not adapted. The inputs are those of `split`, without
    labels. `schedule=fast` takes a fifth of `max_steps` and reaches about as far. The coefficients are also saved as
    `save_merging_weights`, and the states of interrupted loops below `cache_dir`. `num_workers` and `strict` have no
    effect, and are accepted for existing configurations: inputs are decoded once, names are always compared strictly,
    and tied tensors stay tied.
    """

    name: Literal[
        "layer_wise_adamerging",
        "clip_layer_wise_adamerging",
        "lw_adamerging",
        "task_wise_adamerging",
        "clip_task_wise_adamerging",
        "tw_adamerging",
        "lw_adamergingpp",
        "tw_adamergingpp",
    ] = "layer_wise_adamerging"
    weights: str | list | None = None
    granularity: Literal["task", "layer", "block"] | list[str] | dict[str, str] | None = None  # type: ignore[assignment]
    objective: Literal["entropy", "entropy_epsilon", "expert_cross_entropy", "expert_kl", "expert_feature_l1"] = (
        "entropy"
    )
    init_values: float | str | list = 0.3
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    schedule: Schedule = "constant"
    plus_plus: bool | None = None  # type: ignore[assignment]
    max_steps: Annotated[int, Ge(0)] = 1000
    vectors_dtype: Literal["float32", "bfloat16", "float16"] | None = None  # type: ignore[assignment]
    batch_size: Annotated[int, Ge(1)] = 16
    split: Literal["test", "train"] = "test"
    eval_iterations: Annotated[int, Ge(0)] = 0
    devices: Annotated[int, Ge(1)] = 1
    fast_dev_run: bool = False
    save_merging_weights: str | None = "merging_weights.pt"
    cache_dir: str = "outputs"
    tie_weights: bool = True
    strict: bool = False
    num_workers: Annotated[int, Ge(0)] = 8

    @property
    def label(self) -> str:
        """The name of the method's row in the report."""
        return self.name

    def problems(self, models: Models, tasks: tuple[str, ...]) -> list[str]:
        """Reasons why the run would fail later, one line each; nothing is decoded or adapted."""
        problems = [] if self.weights is not None else models.unmatched(tasks)
        if not self.tie_weights and (aliases := models.base.aliases):
            tied = next(iter(aliases.items()))
            problems.append(f"method.tie_weights=false, but '{tied[0]}' is tied to '{tied[1]}'. Remedy: leave it true.")
        try:
            names = matched_tensors(models.new_encoder(), models.vectors())[0]
            arrangement = layout(self.options.granularity, tuple(models.experts), names)
            initial_values(self.init_values if self.weights is None else self.weights, arrangement)
        except SutureError as error:
            problems.append(str(error))
        return problems

    def memory(self, models: Models) -> int | None:
        """Bytes held besides the activations: the task vectors, the base, the merged weights and one gradient."""
        entries = models.vectors().stream().num_entries
        itemsize = getattr(torch, self.vectors_dtype or "float32").itemsize
        rows = 0 if self.stream_vectors else len(models.experts) * itemsize
        return entries * (rows + 3 * 4)

    def merge(
        self, models: Models, inputs: SplitInputs, context: Context, out: Mapping[str, Tensor] | None = None
    ) -> MergeResult:
        """Learn the coefficients, or take the given `weights`, and merge with them."""
        if self.weights is None:
            learned = self._learn(models, inputs, context)
        else:
            learned = adapt(
                models.new_encoder(),
                models.base,
                models.experts,
                {},
                frozen=models.pool.frozen,
                mixed_dtypes=True,
                **self._options_with(init_values=self.weights, max_steps=0),
            )
        steps = len(learned.losses)
        how = f"coefficients, {steps:,} steps on all {self.split} inputs" if steps else ""
        split = self.split if steps else ""
        merged = written(learned.merged, out)
        return MergeResult(self.label, merged, learned, how, warnings=learned.warnings, split=split)

    def steps(self, fast: bool) -> int:
        """The number of steps; `fast`: of a fast_dev_run."""
        steps = self.max_steps // _FASTER if self.schedule == "fast" else self.max_steps
        return min(steps, FEW) if self.fast_dev_run or fast else steps

    @property
    def options(self) -> AdaMergingOptions:
        """The options of `adapt` that the knobs stand for."""
        return AdaMergingOptions.of(self._options_with())

    def _options_with(self, **changes: Any) -> dict[str, Any]:
        granularity, plus_plus = NAMES[self.name]
        options = {name: getattr(self, name) for name in _OPTIONS}
        options["granularity"] = granularity if self.granularity is None else self.granularity
        options["plus_plus"] = plus_plus if self.plus_plus is None else self.plus_plus
        options["vectors_dtype"] = getattr(torch, self.vectors_dtype) if self.vectors_dtype else None
        return options | changes

    def _learn(self, models: Models, inputs: SplitInputs, context: Context) -> AdaMergingResult:
        tasks = {name: inputs[self.split][name] for name in models.experts}
        batches = {
            name: ShuffledBatches(task.inputs, self.batch_size, seed=context.seed, name=name)
            for name, task in tasks.items()
        }
        steps = self.steps(context.fast)
        resume = context.resume(self.name, self.cache_dir, self._work(steps))

        def score(step: int, module: nn.Module) -> float:
            test = {name: inputs["test"][name] for name in models.experts}
            return context.scorer.row(f"{self.name} @ {step}", module, test).mean

        encoder = models.new_encoder()  # before processes are forked, so that they share it

        def adapt_on(fabric: Any) -> AdaMergingResult:
            with context.watch(self.name, steps, resume, quiet=fabric.global_rank > 0) as watch:
                return adapt(
                    encoder,
                    models.base,
                    models.experts,
                    batches,
                    models.family.merged_logits() or {name: task.logits for name, task in tasks.items()},
                    forward=context.device.plain_call,
                    frozen=models.pool.frozen,
                    mixed_dtypes=True,
                    fabric=fabric,
                    resume=resume,
                    profile=context.profile,
                    on_step=watch,
                    eval_iterations=self.eval_iterations,
                    on_evaluation=score,
                    **self._options_with(max_steps=steps),
                )

        learned = context.launch(adapt_on, self.devices)
        few = {name: task.inputs for name, task in tasks.items()}
        with context.profile("evaluation"):
            norms = context.together(partial(_feature_norms, models, learned.merged, few))
        return replace(learned, feature_norms=norms)

    def _work(self, steps: int) -> dict[str, Any]:
        """Everything that determines the result, so that a state is only resumed for the same work."""
        decisive = {key: str(value) for key, value in asdict(self).items() if key not in _WITHOUT_EFFECT}
        return decisive | {"max_steps": str(steps), "fast_dev_run": "", "name": str(NAMES[self.name])}


@dataclass(frozen=True, kw_only=True)
class AdaMergingSurgery(AdaMerging):
    """Layer-wise AdaMerging, then Representation Surgery on the final feature; both results are saved.

    The keys are those of `adamerging`; surgery takes `surgery_steps` steps with its own Adam of `surgery_lr`.
    """

    eval_iterations: Annotated[int, Ge(0)] = 200
    surgery_steps: Annotated[int, Ge(1)] = 1000
    surgery_lr: Annotated[float, Gt(0)] = 1e-3
    surgery_rank: Annotated[int, Ge(1)] = 16

    @property
    def label(self) -> str:
        """The name of the merge's row; the repair has its own."""
        return "adamerging"

    @property
    def repairs(self) -> tuple[Repair, ...]:
        """The surgery that follows."""
        knobs = {"steps": self.surgery_steps, "lr": self.surgery_lr, "rank": self.surgery_rank}
        shared = {"eval_iterations": self.eval_iterations, "split": self.split, "cache_dir": self.cache_dir}
        return (Repair.of("final", {**knobs, **shared}, row="surgery"),)


def _feature_norms(
    models: Models, merged: Mapping[str, Tensor], inputs: Mapping[str, Any], context: Context
) -> dict[str, FeatureNorm]:
    load, load_expert = (models.loader(context.device, unread=context.sharded) for _ in range(2))
    options: dict[str, Any] = {"forward": context.device.call, "num_inputs": COMPARED, "fabric": context.group}
    return feature_norms(load(merged), lambda task: load_expert(models.experts[task]), inputs, **options)
