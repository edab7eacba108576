"""Data as their authors' archives, torchvision and the papers' scripts leave them: what a task's `layouts` say.

A layout is data, in tasks/known/*.yaml or in a pool of one's own. Its `kind` is one of the classes below and its other
keys are that class's fields; `within` are folders below the task's in which its files may lie as well.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from suture.errors import ConfigError, check_known, unknown_name
from suture.tasks.base import Source, Split, Task
from suture.tasks.layouts.arrays import Arrays
from suture.tasks.layouts.listing import Listing

Layout = Listing | Arrays
_KINDS: dict[str, type[Layout]] = {"arrays": Arrays, "listing": Listing}


def layout(words: Mapping[str, Any]) -> Layout:
    """A layout from its words; raises `ConfigError` for an unknown kind or key."""
    told = {key: value for key, value in words.items() if key not in ("kind", "within")}
    if words.get("kind") not in _KINDS:
        raise ConfigError(unknown_name("kind of layout", str(words.get("kind")), _KINDS))
    kind = _KINDS[words["kind"]]
    known = {each.name for each in fields(kind)}
    check_known(f"key of a layout of kind {words['kind']}", told, {*known, "within"})
    return kind(**told)


def source(folder: Path, split: Split, task: Task, *, of: Sequence[Split]) -> tuple[Path, Source] | None:
    """The folder of a layout with something in it for one of the splits `of`, and its reader."""
    for words in task.layouts:
        found = layout(words)
        for place in (folder, *(folder / name for name in words.get("within", ()))):
            if split in _splits(found) and any(found.has(place, each) for each in of):
                return place, Source(found.wanted(split), Path.is_dir, found.load, found.problems, found.count)
    return None


def wanted(split: Split, task: Task) -> list[str]:
    """The task's layouts, as messages name them."""
    found = [layout(words) for words in task.layouts]
    return [each.wanted(split) for each in found if split in _splits(each)]


def _splits(found: Layout) -> Mapping[Split, Any]:
    return found.index if isinstance(found, Listing) else found.images
