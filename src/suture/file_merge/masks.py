"""Masks for tasks from files: one update and one bit a weight and task, beside the pretrained model."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suture.checkpoints.provenance import PROVENANCE
from suture.errors import PRETRAINED, ConfigError
from suture.merging.masking import Over, emr_masks_of, tall_masks_of
from suture.merging.methods.consensus import MASK_THRESHOLD, Threshold
from suture.merging.registry import MergeMethod
from suture.merging.task_masks import MASKS_FILE, TaskMasks
from suture.merging.task_vectors import TaskVectors
from suture.pipeline.card_parts import command_line, front_matter, inputs_table
from suture.storage.atomic import new_directory

if TYPE_CHECKING:
    from suture.file_merge.inputs import Inputs
    from suture.file_merge.options import MergeOptions


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


def check_masks(options: "MergeOptions") -> None:
    """Refuse options that a file of masks cannot follow (`ConfigError`)."""
    unfit = {
        "method.after": options.after,
        "dtype": options.dtype,
        "shard": options.part != (1, 1),
        "device": options.device != "cpu",
        "vocabulary": options.vocabulary != "refuse",
        "allow_non_finite": options.allow_non_finite,
    }
    if given := [key for key, value in unfit.items() if value]:
        raise ConfigError(f"{given[0]} is not for {options.method.name}, which writes masks. Remedy: leave it out.")
    if options.base is None:
        raise ConfigError(f"{options.method.name} needs the pretrained model. Remedy: give base=PATH.")
    options.method.knobs.validate(options.knobs)


def write_masks(options: "MergeOptions", inputs: "Inputs", vectors: TaskVectors, work: dict[str, Any]) -> None:
    """Write the folder of a merge: masks, record and model card, all or nothing."""
    knobs = options.method.knobs.validate(options.knobs)
    with new_directory(options.output, overwrite=options.overwrite, inputs=inputs.paths) as folder:
        masks = options.method.function(vectors, folder / MASKS_FILE, **knobs)
        inputs.check_unchanged()
        origin = {**inputs.provenance(), "command": options.command, "work": work}
        (folder / PROVENANCE).write_text(json.dumps(origin, indent=2) + "\n", "utf-8")
        (folder / "README.md").write_text(_card(options, masks, origin), "utf-8")


def _card(options: "MergeOptions", masks: TaskMasks, origin: dict[str, Any]) -> str:
    sources = {PRETRAINED: options.base, **options.models}
    lines = [
        *front_matter(list(sources.values()), [options.method.name], "suture"),
        f"# {options.output.name}",
        "",
        f"Masks for the tasks {', '.join(masks.tasks)}, made by [{options.method.name}]({options.method.paper}) with "
        f"suture {origin['versions']['suture']}: one update, and one bit a weight and task. The weights of one task:",
        "",
        "```python",
        "import suture",
        "",
        f'masks = suture.TaskMasks.load("{options.output.name}", {_source(options.base)})',
        f'weights = masks.for_task("{masks.tasks[0]}")',
        "```",
        "",
        *inputs_table(sources, origin["inputs"]),
        "",
        *([command_line(origin["command"]), ""] if origin["command"] else []),
    ]
    return "\n".join(lines)


def _source(base: Any) -> str:
    return json.dumps(os.fspath(base)) if isinstance(base, str | os.PathLike) else '"PRETRAINED"'
