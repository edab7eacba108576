"""The inputs of a merge of files: opened, made to fit one another where that was asked for, and checked."""

import json
import threading
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from suture import __version__
from suture.checkpoints import Checkpoint, content_hash, open_checkpoint, open_fine_tuned, provenance_of
from suture.checkpoints.adapter_bases import base_notes
from suture.checkpoints.adapters import is_adapter, untied
from suture.checkpoints.matching import matched
from suture.errors import BASE, PRETRAINED, IncompatibleModels, SutureError, refusal
from suture.file_merge.mergekit.chat_template import template_notes
from suture.file_merge.options import MergeOptions
from suture.file_merge.vocabulary import fit
from suture.merging.compatibility import compatibility
from suture.merging.selection import select
from suture.storage.remote import RemotePath


@dataclass
class Inputs:
    """Base and models as they are merged.

    `opened` are all of them as they are on disk, `config` the configuration that goes with the result, if there is one,
    `tokenizer` the text of its tokenizer where the vocabulary is a new one, `notes` say what was read how, and `frozen`
    are the tensors that stay at the base.
    """

    base: Checkpoint
    models: Mapping[str, Checkpoint]
    opened: Mapping[str, Checkpoint]
    config: Mapping[str, Any] | None = None
    tokenizer: str | None = None
    notes: Sequence[str] = ()
    frozen: Sequence[str] = ()
    _states: dict[Path, list[int]] = field(default_factory=dict)
    _hashing: threading.Thread | None = None
    _provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        self._states = {file: _state(file) for c in self.opened.values() for file in c.files}

    @property
    def directory(self) -> Path | None:
        """The model directory whose configuration and tokenizer go with the result: the base's, or the first."""
        return _directory(self.opened)

    @property
    def paths(self) -> list[Path]:
        """The files and directories that the models come from."""
        directories = [c.directory for c in self.opened.values() if c.directory is not None]
        return [path for path in (*directories, *self._states) if not isinstance(path, RemotePath)]

    @property
    def remote(self) -> bool:
        """Whether some of the files lie elsewhere."""
        return any(isinstance(file, RemotePath) for file in self._states)

    def let_go(self) -> None:
        """Forget the pages of the files that were read; what is read again comes from the system's cache."""
        for checkpoint in self.opened.values():
            checkpoint.let_go()

    def check_unchanged(self) -> None:
        """Refuse inputs that were written to or replaced since they were opened (`CheckpointError`)."""
        for file, state in self._states.items():
            if _state(file) != state:
                problem = "changed while it was merged, so that the result would be of neither version"
                raise refusal(file, problem, "leave it alone during the merge, and merge again")

    def work(self, options: MergeOptions) -> dict[str, Any]:
        """All that decides the result, and nothing else."""
        device = options.device.partition(":")[0]
        return {
            "inputs": {label: self._identity(checkpoint) for label, checkpoint in self.opened.items()},
            "method": options.method.name,
            "settings": _plain(options.translation.content if options.translation else options.knobs),
            "dtype": str(options.dtype).removeprefix("torch.") if options.dtype else None,
            "shard_size": options.shard_size,
            "vocabulary": options.vocabulary,
            "allow_non_finite": list(options.allow_non_finite),
            "suture": __version__,
            **({"after": {w.name: _plain(knobs) for w, knobs in options.after}} if options.after else {}),
            **({"selection": _plain(asdict(options.selection))} if options.selection else {}),
            **({"key": options.key} if options.key else {}),
            **({"encode": options.encode} if options.encode else {}),
        } | ({} if device == "cpu" else {"device": device})  # a device rounds sums otherwise

    def _identity(self, checkpoint: Checkpoint) -> Any:
        """Files by path, size and time of change; what is in memory by its content."""
        if not checkpoint.files:
            return content_hash(checkpoint)
        return [[str(file.absolute()), *self._states[file][:2]] for file in checkpoint.files]

    def hash_beside(self) -> None:
        """Begin to hash the input files on a thread of its own."""

        def work() -> None:
            with suppress(SutureError):  # is met again by whoever asks
                self._provenance.update(provenance_of(self.opened))

        self._hashing = threading.Thread(target=work, daemon=True)
        self._hashing.start()

    def provenance(self) -> dict[str, Any]:
        """Versions, and the sha256 of every input file."""
        if self._hashing is not None:
            self._hashing.join()
        return self._provenance or provenance_of(self.opened)


def open_inputs(options: MergeOptions) -> Inputs:
    """Open all, from headers alone; raises `CheckpointError`, and `IncompatibleModels` for what does not fit."""
    tied = open_checkpoint(_not_an_adapter(options.base), label=BASE, key=options.key)
    base = untied(tied, options.models.values())
    key = options.key
    models = {name: open_fine_tuned(model, base, label=name, key=key) for name, model in options.models.items()}
    opened = {PRETRAINED: base, **models}
    found = matched(base, models)
    config = _read_config(_directory(opened))
    chosen = select(found.base, found.models, options.selection)
    fitted = fit(found.base, chosen.models, options.vocabulary)
    apart = {"tie_word_embeddings": False} if base is not tied else {}
    if not options.encode:
        config = _plain_weights(config, opened)
    config = None if config is None else {**config, **apart, **fitted.config}
    notes = [*_read_as(opened.values()), *found.notes, *template_notes(opened.values()), *base_notes(models, base)]
    if base is not tied:
        notes.append("An adapter changes one name of a tied tensor alone, so the result has both, not tied.")
    inputs = Inputs(
        fitted.base, fitted.models, opened, config, fitted.tokenizer, notes, (*options.frozen, *chosen.frozen)
    )
    problems = compatibility(
        inputs.base,
        inputs.models,
        frozen=inputs.frozen,
        mixed_dtypes=options.mixed_dtypes,
        by_row=options.vocabulary != "refuse",
    )
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise IncompatibleModels(problems[0] + more)
    return inputs


def _read_as(opened: Collection[Checkpoint]) -> list[str]:
    """A line for each model that has a prefix before all names, or codes that are decoded."""
    prefixed = [c for c in opened if c.prefix]
    prefixes = [f"'{c.label}' has the prefix '{c.prefix}' before all names, left out." for c in prefixed]
    return prefixes + [f"'{c.label}' has {c.decoded}, which are decoded." for c in opened if c.decoded]


def _plain_weights(config: dict[str, Any] | None, opened: Mapping[str, Checkpoint]) -> dict[str, Any] | None:
    """A configuration that speaks of no codes, where those were decoded."""
    if config is None:
        return None
    decoded = any(checkpoint.decoded for checkpoint in opened.values())
    return {key: value for key, value in config.items() if not (decoded and key == "quantization_config")}


def _not_an_adapter(base: Any) -> Any:
    if base is not None and is_adapter(base):
        raise SutureError(f"'{base}' is an adapter, not a base. Remedy: give base=PATH, the model it was trained on.")
    return base


def _directory(opened: Mapping[str, Checkpoint]) -> Path | None:
    return next((c.directory for c in opened.values() if c.directory is not None), None)


def _read_config(directory: Path | None) -> dict[str, Any] | None:
    """A model directory's config.json; raises `CheckpointError` for one that does not hold a configuration."""
    if directory is None or not (path := directory / "config.json").exists():
        return None
    remedy = "download it again, or give the weights' file from a folder without it"
    try:
        config = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise refusal(path, f"cannot be read: {error.strerror or error}", remedy) from None
    except (ValueError, RecursionError):
        raise refusal(path, "is not valid JSON", remedy) from None
    if not isinstance(config, dict):
        raise refusal(path, f"holds {type(config).__name__}, not a configuration", remedy)
    return config


def _state(file: Path) -> list[int]:
    """Size, time of change in ns, and the file's number on its disk."""
    try:
        state = file.stat()
    except OSError as error:
        raise refusal(file, f"cannot be read: {error.strerror or error}", "check that it still exists") from None
    return [state.st_size, state.st_mtime_ns, state.st_ino]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return list(map(_plain, value)) if isinstance(value, list | tuple) else value
