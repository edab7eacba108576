"""AdaMerging as `method=adamerging` runs it: on a pool's encoder, with the inputs and heads of a task pool."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le

from suture.adaptation.adamerging import AdaMergingResult, adapt
from suture.adaptation.coefficients import initial_values, layout
from suture.adaptation.merged_model import matched_tensors
from suture.adaptation.schedules import Schedule
from suture.core.batches import ShuffledBatches
from suture.errors import SutureError
from suture.evaluation import Row
from suture.pipeline.context import FEW, Stage

#: What each name stands for: (granularity, whether the task vectors are those of AdaMerging++).
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
_FASTER = 5  # the fast schedule gets as far in a fifth of the steps
_WITHOUT_EFFECT = {"cache_dir", "devices", "eval_iterations", "num_workers", "save_merging_weights", "strict"}


@dataclass(frozen=True)
class Adapted:
    """The result of adaptation, the scores on the way (step → row of the accuracy table), the coefficients' file."""

    result: AdaMergingResult
    scores: Mapping[int, Row] = field(default_factory=dict)
    save_as: str | None = None


@dataclass(frozen=True, kw_only=True)
class AdaMerging:
    """Learn the coefficients of the task vectors by minimising the entropy on unlabelled inputs.

    `name` stands for a granularity, and for AdaMerging++ or not; `granularity` and `plus_plus` overrule it. `weights`
    (a list, .npy, .pt or .safetensors) are coefficients to be taken as they are, without adaptation. The inputs are
    those of `split`, without their labels, decoded once (so there are no workers to number: `num_workers` is there for
    old configurations). `schedule=fast` takes a fifth of `max_steps` and gets about as far. Names are always compared
    strictly and tied tensors stay tied, whatever `strict` says.
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
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    lr: Annotated[float, Gt(0)] = 1e-3
    init_values: float | str | list = 0.3
    clamp_weights: bool = False
    tie_weights: bool = True
    strict: bool = False
    devices: Annotated[int, Ge(1)] = 1
    batch_size: Annotated[int, Ge(1)] = 16
    num_workers: Annotated[int, Ge(0)] = 8
    max_steps: Annotated[int, Ge(0)] = 1000
    schedule: Schedule = "constant"
    fast_dev_run: bool = False
    save_merging_weights: str | None = "merging_weights.pt"
    cache_dir: str = "outputs"
    granularity: Literal["task", "layer", "block"] | list[str] | dict[str, str] | None = None
    plus_plus: bool | None = None
    threshold: Annotated[float, Gt(0), Le(100)] = 20.0
    objective: Literal["entropy", "entropy_epsilon", "expert_cross_entropy", "expert_feature_l1"] = "entropy"
    softmax: bool = False
    weight_decay: Annotated[float, Ge(0)] = 0.0
    split: Literal["test", "train"] = "test"
    eval_iterations: Annotated[int, Ge(0)] = 0
    micro_batch: Annotated[int, Ge(1)] | None = None
    vectors_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    stream_vectors: bool = False

    def problems(self, stage: Stage) -> list[str]:
        """What would end the run later on, one line each; nothing is decoded or adapted."""
        found = [] if self.weights is not None else stage.unmatched_tasks()
        if not self.tie_weights and (aliases := stage.vectors.base.aliases):
            tied = next(iter(aliases.items()))
            found.append(f"method.tie_weights=false, but '{tied[0]}' is tied to '{tied[1]}'. Remedy: leave it true.")
        try:
            self._starting_values(stage)
        except SutureError as error:
            found.append(str(error))
        return found

    def memory(self, stage: Stage) -> int:
        """Bytes held beside the activations: the task vectors, the base, the merged weights and one gradient."""
        entries = sum(stage.vectors.base.specs[name].numel for name in stage.vectors.names)
        itemsize = getattr(torch, self.vectors_dtype or "float32").itemsize
        rows = 0 if self.stream_vectors else len(stage.vectors.models) * itemsize
        return entries * (rows + 3 * 4)

    def run(self, stage: Stage) -> Adapted:
        """Adapt, or take the coefficients that were given."""
        if self.weights is not None:
            return Adapted(
                self._adapt(stage, {}, None, init_values=self.weights, max_steps=0), {}, self.save_merging_weights
            )
        tasks = stage.inputs(self.split)
        batches = {n: ShuffledBatches(t.inputs, self.batch_size, seed=stage.seed, name=n) for n, t in tasks.items()}
        heads = {n: t.logits for n, t in tasks.items()}
        steps = self.max_steps // _FASTER if self.schedule == "fast" else self.max_steps
        steps = min(steps, FEW) if self.fast_dev_run else stage.shortened(steps)
        resume = stage.resume(self.cache_dir, self._work(steps))

        def everywhere(fabric) -> Adapted:
            scores: dict[int, Row] = {}
            score = lambda step, module: scores.update({step: stage.score(f"{self.name} @ {step}", module)})
            with stage.watch(self.name, steps, resume, quiet=fabric.global_rank > 0) as watch:
                running = {"fabric": fabric, "resume": resume, "profile": stage.profile, "on_step": watch}
                running |= {"eval_iterations": self.eval_iterations, "on_evaluation": score}
                result = self._adapt(stage, batches, heads, init_values=self.init_values, max_steps=steps, **running)
            return Adapted(result, scores, self.save_merging_weights)

        return stage.run(everywhere, self.devices)

    @property
    def _granularity(self) -> Any:
        return NAMES[self.name][0] if self.granularity is None else self.granularity

    def _adapt(self, stage: Stage, batches: Mapping, heads: Mapping | None, **running) -> AdaMergingResult:
        return adapt(
            stage.encoder,
            stage.vectors.base,
            stage.vectors.models,
            batches,
            heads,
            granularity=self._granularity,
            objective=self.objective,
            optimizer=self.optimizer,
            lr=self.lr,
            schedule=self.schedule,
            weight_decay=self.weight_decay,
            clamp_weights=self.clamp_weights,
            softmax=self.softmax,
            micro_batch=self.micro_batch,
            plus_plus=NAMES[self.name][1] if self.plus_plus is None else self.plus_plus,
            threshold=self.threshold,
            frozen=stage.vectors.frozen,
            mixed_dtypes=True,
            vectors_dtype=getattr(torch, self.vectors_dtype) if self.vectors_dtype else None,
            stream_vectors=self.stream_vectors,
            **running,
        )

    def _starting_values(self, stage: Stage) -> torch.Tensor:
        names = matched_tensors(stage.encoder, stage.vectors)[0]
        arrangement = layout(self._granularity, tuple(stage.vectors.models), names)
        return initial_values(self.init_values if self.weights is None else self.weights, arrangement)

    def _work(self, steps: int) -> dict[str, Any]:
        """What decides the result, so that only the same work is taken up again."""
        told = {key: str(value) for key, value in asdict(self).items() if key not in _WITHOUT_EFFECT}
        return told | {"max_steps": str(steps), "fast_dev_run": "", "name": str(NAMES[self.name])}


@dataclass(frozen=True, kw_only=True)
class AdaMergingSurgery(AdaMerging):
    """Layer-wise AdaMerging, then Representation Surgery on the final feature; both results are kept.

    The keys are those of `adamerging`; surgery takes `surgery_steps` steps with its own Adam of `surgery_lr`.
    """

    eval_iterations: Annotated[int, Ge(0)] = 200
    surgery_steps: Annotated[int, Ge(1)] = 1000
    surgery_lr: Annotated[float, Gt(0)] = 1e-3
    surgery_rank: Annotated[int, Ge(1)] = 16
