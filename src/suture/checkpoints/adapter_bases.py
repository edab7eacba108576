"""The base that an adapter says it was trained on, against the one that is given."""

import re
from collections.abc import Mapping
from pathlib import Path

from suture.checkpoints.checkpoint import Checkpoint
from suture.checkpoints.json_files import is_text, model_config, read_object
from suture.errors import shown

_CONFIG = "adapter_config.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CACHED = re.compile(r"models--([^/]+)--([^/]+)")


def base_notes(models: Mapping[str, Checkpoint], base: Checkpoint | None = None) -> list[str]:
    """A line for each opened adapter that was trained on another base than the given one, or than the other adapters.

    Bases are compared by their names on the hub, and by their folders where these exist: what is known by neither is
    not compared. They may still hold the same weights, so this refuses nothing.
    """
    stated = {label: name for label, model in models.items() if (name := _stated(model))}
    notes = [
        f"'{label}' was trained on '{shown(name)}', by its {_CONFIG}; the base is '{shown(given)}'."
        for label, name in stated.items()
        if base is not None and (given := _given(base, name)) and not _alike(given, name)
    ]
    if notes or not stated:
        return notes
    first, known = next(iter(stated.items()))
    return [
        f"'{label}' was trained on '{shown(name)}' and '{first}' on '{shown(known)}', by their {_CONFIG}."
        for label, name in stated.items()
        if not _alike(known, name)
    ]


def _stated(model: Checkpoint) -> str | None:
    """The base's name or path in an adapter's configuration; None for a whole model, and where there is none."""
    if not model.files or not model.files[0].name.startswith("adapter_model."):
        return None
    config = read_object(model.files[0].parent / _CONFIG, "copy or download the adapter again")
    name = config.get("base_model_name_or_path")
    return name if is_text(name) and name.strip() else None


def _given(base: Checkpoint, stated: str) -> str | None:
    """The given base as it can be compared with a stated one: its name on the hub, or its folder; None for neither."""
    if base.directory is None:
        return None
    if _is_folder(stated):
        return str(base.directory)
    if found := _CACHED.search(base.directory.absolute().as_posix()):
        return f"{found[1]}/{found[2]}"
    name = model_config(base.directory).get("_name_or_path")
    return name if is_text(name) and _HUB_ID.fullmatch(name) and _HUB_ID.fullmatch(stated) else None


def _alike(one: str, other: str) -> bool:
    """Whether two names are one base: the same folder, or the same last part, as copies and mirrors have it."""
    if _is_folder(one) and _is_folder(other):
        return Path(one).resolve() == Path(other).resolve() or _last(one) == _last(other)
    return _last(one) == _last(other)


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()


def _is_folder(name: str) -> bool:
    try:
        return Path(name).is_dir()
    except (OSError, ValueError):
        return False
