"""The inputs of a merge of files: opened, made to fit one another where that was asked for, and checked."""

import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from suture.checkpoints import Checkpoint, content_hash, open_checkpoint, open_fine_tuned, provenance
from suture.checkpoints.adapters import is_adapter
from suture.errors import IncompatibleModels, SutureError
from suture.file_merge.options import Recipe
from suture.file_merge.vocabulary import fit
from suture.merging.compatibility import compatibility

BASE = "_pretrained_"


@dataclass
class Inputs:
    """Base and models as they are merged; `opened` are all of them as they are on disk."""

    base: Checkpoint
    models: Mapping[str, Checkpoint]
    opened: Mapping[str, Checkpoint]
    config: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    _hashing: threading.Thread | None = None
    _provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def directory(self) -> Path | None:
        """The model directory whose configuration and tokenizer go with the result: the base's, or the first."""
        return next((c.directory for c in self.opened.values() if c.directory is not None), None)

    def let_go(self) -> None:
        """Forget the pages of the files that were read; what is read again comes from the system's cache."""
        for checkpoint in self.opened.values():
            checkpoint.let_go()

    def work(self, recipe: Recipe) -> dict[str, Any]:
        """All that decides the result, and nothing else."""
        return {
            "inputs": {label: _identity(checkpoint) for label, checkpoint in self.opened.items()},
            "method": recipe.method.name,
            "settings": _plain(recipe.translation.told if recipe.translation else recipe.settings),
            "dtype": str(recipe.dtype).removeprefix("torch.") if recipe.dtype else None,
            "shard_size": recipe.shard_size,
            "vocabulary": recipe.vocabulary,
            "allow_non_finite": list(recipe.allow_non_finite),
            "suture": version("suture"),
        } | ({} if recipe.device == "cpu" else {"device": recipe.device.partition(":")[0]})  # another rounding of sums

    def hash_beside(self) -> None:
        """Begin to hash the input files on a thread of its own."""

        def work() -> None:
            with suppress(SutureError):  # is met again by whoever asks
                self._provenance.update(provenance(self.opened))

        self._hashing = threading.Thread(target=work, daemon=True)
        self._hashing.start()

    def provenance(self) -> dict[str, Any]:
        """Versions, and the sha256 of every input file."""
        if self._hashing is not None:
            self._hashing.join()
        return self._provenance or provenance(self.opened)


def open_inputs(recipe: Recipe) -> Inputs:
    """Open all, from headers alone; raises `CheckpointError`, and `IncompatibleModels` for what does not fit."""
    base = open_checkpoint(_not_an_adapter(recipe.base), label=BASE)
    models = {name: open_fine_tuned(model, base, label=name) for name, model in recipe.models.items()}
    fitted = fit(base, models, recipe.vocabulary)
    inputs = Inputs(fitted.base, fitted.models, {BASE: base, **models}, fitted.config, fitted.tokenizer)
    how = {"frozen": recipe.frozen, "mixed_dtypes": recipe.mixed_dtypes, "by_row": recipe.vocabulary != "refuse"}
    problems = compatibility(inputs.base, inputs.models, **how)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise IncompatibleModels(problems[0] + more)
    return inputs


def _not_an_adapter(base: Any) -> Any:
    if base is not None and is_adapter(base):
        raise SutureError(f"'{base}' is an adapter, not a base. Remedy: give base=PATH, the model it was trained on.")
    return base


def _identity(checkpoint: Checkpoint) -> Any:
    """Files by path, size and time of change; what is in memory by its content."""
    if not checkpoint.files:
        return content_hash(checkpoint)
    states = [(str(path.absolute()), path.stat()) for path in checkpoint.files]
    return [[path, state.st_size, state.st_mtime_ns] for path, state in states]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return list(map(_plain, value)) if isinstance(value, list | tuple) else value
