"""The methods that leave masks for tasks, as `suture merge` takes them."""

from collections.abc import Sequence
from pathlib import Path

from suture.merging.masking import Over, emr_masks_of, tall_masks_of
from suture.merging.methods.consensus import MASK_THRESHOLD, Threshold
from suture.merging.registry import MergeMethod
from suture.merging.task_masks import TaskMasks
from suture.merging.task_vectors import TaskVectors


def _tall_masks(
    vectors: TaskVectors,
    path: Path,
    *,
    mask_threshold: Threshold | list[Threshold] = MASK_THRESHOLD,
    over: Over = "sum",
    remove_keys: Sequence[str] = (),
) -> TaskMasks:
    """Write the sum of all task vectors, and the entries of it that each task needs: see `suture.tall_masks`."""
    return tall_masks_of(vectors, mask_threshold, path, over)


def _emr_merging(vectors: TaskVectors, path: Path, *, remove_keys: Sequence[str] = ()) -> TaskMasks:
    """Write the update of elected signs and largest magnitudes, and each task's part of it: see `suture.emr_masks`."""
    return emr_masks_of(vectors, path)


_TALL = MergeMethod("tall_masks", _tall_masks, "https://arxiv.org/abs/2405.07813")
_EMR = MergeMethod("emr_merging", _emr_merging, "https://arxiv.org/abs/2405.17461", ("emr",))
MASK_METHODS = {name: method for method in (_TALL, _EMR) for name in (method.name, *method.aliases)}
