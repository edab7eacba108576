"""Adapters as `peft` saves them: a fine-tuned model as its base, changed tensor by tensor.

LoRA and its relatives, IA³, LoHa, LoKr, VeRA, trained tokens and tuned norms (`adapter_kinds` has their arithmetic).
Tuned tensors are made when they are read, slice by slice, so nothing of the base's size is held; and the factors of
LoRA stay available to whoever can work with them.
"""

import os
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from suture.checkpoints.adapter_configs import read_config
from suture.checkpoints.adapter_shapes import check_parts
from suture.checkpoints.adapter_tensors import (
    PREFIX,
    Adapter,
    Naming,
    check_tie,
    find_in_base,
    sort_out,
    tie_of,
    tied_names,
)
from suture.checkpoints.adapter_updates import adapted, updates
from suture.checkpoints.checkpoint import Checkpoint, Entry, Factors
from suture.checkpoints.opening import Source, check_text, open_checkpoint
from suture.checkpoints.quantised import quantised_problem
from suture.errors import CheckpointError, refusal, shown
from suture.storage.hub import download, is_hub_id

_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight")


def is_adapter(source: Source) -> bool:
    """Whether a source is a folder that holds an adapter and no whole model."""
    if not isinstance(source, str | os.PathLike):
        return False
    try:
        return (Path(source) / _CONFIG).is_file()
    except OSError:  # no permission, a name too long: whoever opens it says so
        return False


def open_fine_tuned(
    source: Source,
    base: Checkpoint,
    *,
    label: str | None = None,
    canonical_names: Naming | None = None,
    key: str | None = None,
) -> Checkpoint:
    """A fine-tuned model: whatever `open_checkpoint` takes, or an adapter, which is opened on its base.

    `key` is that of `open_checkpoint`. `canonical_names(names)` maps the base's names to those of an adapter that calls
    its tensors otherwise. Raises `CheckpointError`, also for an adapter that fits nothing in the base or that is of a
    kind which is not read.
    """
    if not (is_adapter(source) or (isinstance(source, str) and is_hub_id(source))):
        return open_checkpoint(source, label=label, key=key)
    check_text(str(source), label)
    try:
        folder = Path(str(source)) if is_adapter(source) else download(str(source))
        if is_adapter(folder):
            return _open_adapter(folder, base, label or str(source), canonical_names)
    except CheckpointError as error:
        raise CheckpointError(f"'{shown(label)}': {error}" if label else str(error)) from error
    return open_checkpoint(source, label=label, key=key)


def adapter_files(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The weights' file and the configuration of an adapter's folder; `CheckpointError` for what is not read."""
    config = read_config(folder / _CONFIG)
    file = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise refusal(folder, f"has no {_WEIGHTS[0]}", "copy or download the adapter again")
    return file, config


def factor_name(module: str, side: str) -> str:
    """The name under which the factor A or B of a module is stored."""
    return f"{PREFIX}{module}.lora_{side}.weight"


def module_and_side(stored: str) -> tuple[str, str] | None:
    """The module and side that make up a factor's name; None for a tensor that is no factor."""
    match = _FACTOR.fullmatch(stored.removeprefix(PREFIX))
    return (match["module"], match["side"]) if match else None


def _open_adapter(folder: Path, base: Checkpoint, label: str, canonical_names: Naming | None) -> Checkpoint:
    if problem := quantised_problem(base):
        raise CheckpointError(problem)
    file, config = adapter_files(folder)
    adapter = Adapter(folder, config, open_checkpoint(file), base)
    sort_out(adapter)
    find_in_base(adapter, canonical_names)
    check_parts(adapter)
    entries = {name: _untouched(base, name) for name in base}
    for name, stored in adapter.replaced.items():
        entries[name] = Entry(adapter.weights.specs[stored], partial(adapter.weights.__getitem__, stored))
    for name, make in updates(adapter).items():
        check_tie(adapter, name)
        for each in tied_names(base, name):
            entries[each] = adapted(adapter, name, make)
    return Checkpoint(entries, label, files=(file,), directory=None)


def untied(base: Checkpoint, sources: Iterable[Source]) -> Checkpoint:
    """The base with a copy of its own for every tied tensor of which some adapter changes one name alone.

    peft trains such an adapter with the other name at the base, so no tied model is equal to it.
    """
    folders = [Path(str(source)) for source in sources if is_adapter(source)]
    apart: dict[str, str] = {}
    for folder in folders:
        file, config = adapter_files(folder)
        adapter = Adapter(folder, config, open_checkpoint(file), base)
        sort_out(adapter)
        for module, parts in adapter.modules.items():
            group = tie_of(base, f"{module}.weight")
            if len(group) > 1 and "trainable_tokens_delta" not in parts:
                apart |= group
    return base.untied(apart) if apart else base


def _untouched(base: Checkpoint, name: str) -> Entry:
    shape = base.specs[name].shape
    rows = shape[0] if shape else 1
    columns = base.specs[name].numel // max(1, rows)
    identity = (id(base), base.aliases.get(name, name)) if name in {*base.aliases, *base.aliases.values()} else None
    return Entry(base.specs[name], lambda: base[name], identity, lambda: Factors.none(rows, columns))
