"""Masks for tasks from files: one update and one bit a weight and task, beside the pretrained model."""

import json
import os
from typing import Any

from suture.checkpoints.provenance import PROVENANCE
from suture.errors import PRETRAINED
from suture.file_merge.inputs import Inputs
from suture.file_merge.options import MergeOptions
from suture.merging.task_masks import MASKS_FILE, TaskMasks
from suture.merging.task_vectors import TaskVectors
from suture.pipeline.card_parts import command_line, front_matter, inputs_table
from suture.storage.atomic import new_directory


def write_masks(options: MergeOptions, inputs: Inputs, vectors: TaskVectors, work: dict[str, Any]) -> None:
    """Write the folder of a merge: masks, record and model card, all or nothing."""
    knobs = options.method.knobs.validate(options.knobs)
    with new_directory(options.output, overwrite=options.overwrite, inputs=inputs.paths) as folder:
        masks = options.method.function(vectors, folder / MASKS_FILE, **knobs)
        inputs.check_unchanged()
        origin = {**inputs.provenance(), "command": options.command, "work": work}
        (folder / PROVENANCE).write_text(json.dumps(origin, indent=2) + "\n", "utf-8")
        (folder / "README.md").write_text(_card(options, masks, origin), "utf-8")


def _card(options: MergeOptions, masks: TaskMasks, origin: dict[str, Any]) -> str:
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
