"""The models of a run in its folder: merged and repaired weights, masks for tasks, modules and folded heads."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from suture.checkpoints import open_checkpoint
from suture.core.machine import Meter
from suture.evaluation import SplitInputs
from suture.merging.task_masks import MASKS_FILE
from suture.pipeline.context import Context
from suture.pipeline.methods import Method
from suture.pipeline.models import Models
from suture.pipeline.results import MergeResult, Outcome
from suture.repairs import (
    FINAL,
    AffineMaps,
    MaskedModel,
    RepairResult,
    SurgeryModel,
    fold_into_heads,
    unfoldable,
)


def merge_into(folder: Path, method: Method, models: Models, inputs: SplitInputs, context: Context) -> MergeResult:
    """Write the model as its family saves it, and the learned coefficients, if any."""
    meter, before = Meter(), context.seconds_before
    with models.new_model(folder / "model") as out:
        merged = method.merge(models, inputs, context, out)
    if merged.learned is not None:
        merged.learned.save(folder, also_as=method.knobs.get("save_merging_weights"))
    seconds = merged.seconds or meter.seconds + context.seconds_before - before
    cost: dict[str, Any] = {"seconds": seconds, "memory": merged.memory or meter.memory}
    return replace(merged, tensors=dict(models.mergeable(open_checkpoint(folder / "model"))), **cost)


def save_repairs(
    repairs: Sequence[RepairResult], models: Models, merged: MergeResult, inputs: SplitInputs, folder: Path
) -> list[str]:
    """Repaired weights as a model directory, masks and modules as safetensors; returns notes about folded maps."""
    beside = [fitted for fitted in repairs if fitted.tensors is None and not isinstance(fitted.model, MaskedModel)]
    notes = []
    for fitted in repairs:
        if isinstance(fitted.model, MaskedModel):
            fitted.model.save(folder / MASKS_FILE, models.stored_names, models.whole_base)
            continue
        if fitted.tensors is None:
            name = f"surgery_{fitted.kind}" if len(beside) > 1 else "surgery"
            fitted.model.save(folder / f"{name}.safetensors")
            notes += _save_folded(fitted, models, merged, inputs, folder)
        else:
            _save_weights(fitted.tensors, models, merged, folder / _folder_name(fitted))
    return notes


def _save_weights(tensors: Mapping[str, Tensor], models: Models, merged: MergeResult, folder: Path) -> None:
    with models.new_model(folder) as out:
        for name, tensor in out.items():
            tensor.copy_(tensors.get(name, merged.tensors[name]))


def _save_folded(
    fitted: RepairResult, models: Models, merged: MergeResult, inputs: SplitInputs, folder: Path
) -> list[str]:
    """For affine maps, a model directory with the maps folded into its heads, or a note that says why there is none."""
    maps = fitted.model.repair_at[FINAL] if isinstance(fitted.model, SurgeryModel) else None
    if not isinstance(maps, AffineMaps):
        return []
    heads = {name: inputs[fitted.split or "test"][name].head for name in fitted.tasks}
    known = {name: head for name, head in heads.items() if head is not None}
    reasons = {name: unfoldable(head) or "has no bias" * (head.bias is None) for name, head in known.items()}
    problem = next((f"that of {name!r} {reason}" for name, reason in reasons.items() if reason), "")
    if not problem:
        out = folder / _folder_name(fitted)
        _save_weights(fitted.model.network.module.state_dict(), models, merged, out)
        if models.family.write_heads(out, fold_into_heads(maps, fitted.tasks, known)):
            return []
        shutil.rmtree(out)
        problem = f"family={models.family.name} stores no heads of single tasks"
    return [f"The affine maps stay beside the model and are not folded into the heads: {problem}."]


def model_folders(outcomes: Sequence[Outcome]) -> dict[str, Path]:
    """Name of a row → the folder of its model, of the merges and of the repairs that change weights alone."""
    folders = {}
    for outcome in outcomes:
        folders[outcome.label] = outcome.folder / "model"
        static = [fitted for fitted in outcome.repairs if fitted.tensors is not None]
        folders |= {fitted.name: outcome.folder / _folder_name(fitted) for fitted in static}
    return folders


def _folder_name(fitted: RepairResult) -> str:
    return "_".join(("model", *fitted.chain))
