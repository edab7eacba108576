"""The methods `tall_masks` and `emr_merging`: one update, and one bit a weight and task."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from suture.core.machine import Meter
from suture.core.names import in_bytes
from suture.core.progress import bar
from suture.errors import SutureError
from suture.evaluation import SplitInputs
from suture.merging.masking import Over, emr_masks_of, tall_masks_of
from suture.merging.methods.consensus import MASK_THRESHOLD, Threshold
from suture.merging.streams import one_each
from suture.merging.task_masks import TaskMasks
from suture.pipeline.context import Context
from suture.pipeline.method_base import MethodBase
from suture.pipeline.models import Models
from suture.pipeline.repairs import NONE, RepairOptions
from suture.pipeline.results import MergeResult
from suture.repairs import MaskedModel, Problem, RepairResult, add_router


@dataclass(frozen=True, kw_only=True)
class EmrMerging(MethodBase):
    """EMR-Merging: one update of elected signs and largest magnitudes; each task takes its part of it, rescaled.

    The merged model is the average of all tasks' models. The rows beside it are those of the tasks' own models, with
    the task given, and chosen by the `router`. That is fitted to the merged model's features of `num_inputs` unlabelled
    inputs of each task's `split`. A routed input takes two encodings, one by the merged model and one by its task's.
    """

    router: Literal["none", "centroids", "linear"] = "linear"
    split: Literal["test", "train"] = "train"
    num_inputs: Annotated[int, Ge(1)] | None = 256

    @property
    def label(self) -> str:
        """The name of the merged model's row."""
        return "emr_merging"

    def problems(self, models: Models, tasks: tuple[str, ...]) -> list[str]:
        """Experts without a task, whose models could not be scored."""
        return models.unmatched(tasks) if tasks else []

    def memory(self, models: Models) -> int | None:
        """Bytes held besides the activations: the update, the bits, and the weights of the task at hand."""
        entries = models.vectors().stream().num_entries
        return entries * (4 + 4) + entries * len(models.experts) // 8

    def merge(
        self, models: Models, inputs: SplitInputs, context: Context, out: Mapping[str, Tensor] | None = None
    ) -> MergeResult:
        """Make the masks, and merge by the average of all tasks' models."""
        meter = Meter()
        with context.profile("merging weights"):
            masks = self.masks(models)
            merged = masks.average(out)
        cost: dict[str, Any] = {"seconds": meter.seconds, "memory": meter.memory}
        model = MaskedModel(models.new_encoder(context.device.device), masks, forward=context.device.call)
        with context.profile("fitting a router"):
            passed = self._route(model, inputs, context)
        result = RepairResult(
            model.kind,
            model,
            torch.zeros(0, len(masks.tasks)),
            warnings=_costs(model),
            added_parameters=model.added_parameters,
            encoders=1 if model.router is None else 2,
            name=f"{self.label} + {model.kind}",
            chain=(model.kind,),
            inputs=passed,
            split=self.split,
            encodings=context.encodings,
            **cost,
        )
        return MergeResult(self.label, merged, masked=result, **cost)

    def masks(self, models: Models) -> TaskMasks:
        """The masks of a pool's models."""
        return emr_masks_of(models.vectors())

    def _route(self, model: MaskedModel, inputs: SplitInputs, context: Context) -> int:
        """Fit the router, if there are inputs to fit it to; returns their number."""
        if self.router == NONE or not inputs.tasks:
            return 0
        options = RepairOptions(split=self.split, num_inputs=self.num_inputs, router=self.router)
        chosen, few = options.select(inputs, model.tasks, context.seed)
        module = model.network.module
        sizes: dict[str, Any] = {"encode_batch": context.sizes, "track": bar}
        problem = Problem(module, dict.fromkeys(few, module), few, context.device.call, context.encodings, **sizes)
        add_router(model, problem, self.router, context.seed)
        return sum(map(len, chosen.values()))


@dataclass(frozen=True, kw_only=True)
class TallMasks(EmrMerging):
    """TALL masks: the sum of all task vectors, of which each task takes the entries that it needs.

    `mask_threshold` is λ of |τ_t| > λ |Σ_s τ_s − τ_t|, one number or one per model of the pool; the authors choose it
    for each task from .2 to .6 on labelled inputs. `over=ties` takes TIES's merged task vector for the sum. Rows,
    router and cost are those of `emr_merging`.
    """

    mask_threshold: Threshold | list[Threshold] = MASK_THRESHOLD
    over: Over = "sum"

    @property
    def label(self) -> str:
        """The name of the merged model's row."""
        return "tall_masks"

    def problems(self, models: Models, tasks: tuple[str, ...]) -> list[str]:
        """As `emr_merging`, and thresholds that are not one for each model."""
        problems = super().problems(models, tasks)
        try:
            one_each(self.mask_threshold, len(models.experts), "mask_threshold")
        except SutureError as error:
            problems.append(str(error))
        return problems

    def masks(self, models: Models) -> TaskMasks:
        """The masks of a pool's models."""
        return tall_masks_of(models.vectors(), self.mask_threshold, over=self.over)


def _costs(model: MaskedModel) -> tuple[str, ...]:
    """One line for the report: bytes stored and encoders run."""
    masks, count = model.masks, len(model.tasks)
    update = sum(tensor.nbytes for tensor in masks.update.values())
    stored = (
        f"{masks.kind} stores {in_bytes(masks.bytes_stored)} beside the pretrained model: {in_bytes(update)} for one "
        f"update, and {count} bits a weight; {count} models would take {in_bytes(masks.bytes_of_models)}."
    )
    routed = "" if model.router is None else " A routed input takes two: the merged model's, then the chosen task's."
    return (f"{stored} Each input takes one encoder, whose weights are switched with the task.{routed}",)
