"""Zero-shot heads, and their cache on disk, keyed by content.

For each class: encode all templates, normalise each, average, normalise. This is CLIP's own procedure,
https://arxiv.org/abs/2103.00020, section 3.1.4.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from suture.core.progress import Track, untracked
from suture.errors import DataError, OutputError
from suture.storage.atomic import write_bytes
from suture.storage.cache import raw_bytes
from suture.tasks.base import Task

_BATCH = 64
ONE_TEMPLATE = "give at least one, such as 'a photo of a {}.'."
log = logging.getLogger(__name__)


def zero_shot_head(
    encode: Callable[[list[str]], Tensor],
    classnames: Sequence[str],
    templates: Sequence[str],
    track: Track = untracked,
) -> Tensor:
    """Class directions (C, D) from `encode`, which maps B prompts to features (B, D); `DataError` without templates."""
    if not templates:
        raise DataError(f"There are no templates to make a head with; {ONE_TEMPLATE}")
    prompts = [template.replace("{}", name) for name in classnames for template in templates]
    encoded = []
    with torch.inference_mode(), track("Encoding class names", len(prompts)) as advance:
        for start in range(0, len(prompts), _BATCH):
            encoded.append(encode(prompts[start : start + _BATCH]))
            advance(len(encoded[-1]))
        directions = normalize(torch.cat(encoded).float(), dim=-1)
        directions = directions.unflatten(0, (len(classnames), len(templates)))
        head = normalize(directions.mean(1), dim=-1)
    return head.clone()  # outside of inference mode, so that the head can be part of a backward pass


def without_templates(task: Task) -> list[str]:
    """One line if a task has no templates to make its zero-shot head from, else none."""
    return [] if task.templates else [f"Task {task.name!r}: it has no templates; {ONE_TEMPLATE}"]


def cached(key: str, make: Callable[[], Tensor]) -> Tensor:
    """The tensor stored under `key`, or else `make()`, which is then stored. A damaged entry is replaced."""
    from suture.storage.cache import cache_directory

    path = cache_directory() / "heads" / f"{key}.safetensors"
    head = _read(path)
    if head is None:
        head = make()
        _write(path, head)
    return head


def _read(path: Path) -> Tensor | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            head, checksum = file.get_tensor("head"), (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError, ValueError):
        return None
    return head if checksum == _sha256(head) else None


def _write(path: Path, head: Tensor) -> None:
    """Write the head whole or not at all. If it cannot be written, only the cache is lost."""
    from safetensors.torch import save

    data = save({"head": head.contiguous()}, {"sha256": _sha256(head)})
    try:
        write_bytes(path, data)
    except OutputError as error:
        log.warning("The head is not cached: %s", error)


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(raw_bytes(tensor.contiguous())).hexdigest()
