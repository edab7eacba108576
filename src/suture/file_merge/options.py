"""Options of a file merge, checked for all that can be checked before a file is opened."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from suture.checkpoints import Source
from suture.checkpoints.adapters import is_adapter
from suture.errors import ConfigError, shown, unknown_name
from suture.file_merge.adapter_spaces import SPACES
from suture.file_merge.destination import Destination
from suture.file_merge.mask_methods import MASK_METHODS
from suture.file_merge.tensor_knobs import TensorKnobs, tensor_knobs
from suture.merging.registry import MergeMethod, get_method
from suture.merging.selection import Selection
from suture.merging.task_vectors import read_device
from suture.merging.wrapping import After, Wrapped, chosen_wrappers
from suture.storage.remote import is_remote

if TYPE_CHECKING:
    from suture.file_merge.mergekit.translation import Translation

VOCABULARY = ("refuse", "base", "crop", "pad", "union")
ENCODE = ("input",)
DTYPES = ("bfloat16", "float16", "float32", "float64")
_MOST_THREADS = 4096
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class MergeOptions:
    """The models of a merge, its method and options, and its output.

    `knobs` are the method's, as they were given (see `tensor_knobs`), `after` the wrappers around it, `part` is (i, n)
    for the i-th of n shares, and `command` is the command line to record, if there was one. `destination` is where the
    finished `output` is sent, if that is elsewhere.
    """

    base: Source | None
    models: Mapping[str, Source]
    method: MergeMethod
    output: Path
    knobs: Mapping[str, Any] = field(default_factory=dict)
    after: Sequence[Wrapped] = ()
    dtype: torch.dtype | None = None
    shard_size: int = 5 * 10**9
    memory: int = 300 * 10**6
    threads: int = 0
    device: str = "cpu"
    part: tuple[int, int] = (1, 1)
    vocabulary: str = "refuse"
    allow_non_finite: Sequence[str] = ()
    mixed_dtypes: bool = False
    overwrite: bool = False
    selection: Selection = field(default_factory=Selection)
    key: str | None = None
    rank: int | None = None
    space: str | None = None
    encode: str | None = None
    translation: "Translation | None" = None
    command: str | None = None
    destination: Destination | None = None

    def tensor_knobs(self, names: Sequence[str]) -> TensorKnobs:
        """The knobs of every tensor."""
        if self.translation is not None:
            return self.translation.tensor_knobs(names)
        return tensor_knobs(self.method, self.knobs, names)

    @property
    def adapters(self) -> bool:
        """Whether adapters are merged into one adapter."""
        return self.base is None

    @property
    def masks(self) -> bool:
        """Whether masks for tasks are written in the place of a merged model."""
        return self.method.name in MASK_METHODS

    @property
    def frozen(self) -> Sequence[str]:
        """Patterns of the tensors that stay at the base."""
        return tuple(self.knobs.get("remove_keys") or ())

    def may_be_non_finite(self, name: str) -> bool:
        """Whether NaN and Inf are allowed in a tensor."""
        return any(fnmatchcase(name, pattern) for pattern in self.allow_non_finite)


def read_options(
    base: Source | None,
    models: Mapping[str, Source] | Sequence[Source],
    method: str,
    output: str | Path,
    *,
    knobs: Mapping[str, Any],
    after: After = None,
    dtype: torch.dtype | str | None = None,
    shard_size: int | str = "5GB",
    memory: int | str = "300MB",
    threads: int = 0,
    device: str = "cpu",
    shard: str | None = None,
    vocabulary: str = "refuse",
    allow_non_finite: Sequence[str] | str = (),
    rank: int | None = None,
    space: str | None = None,
    frozen: Sequence[str] | str = (),
    keep: Sequence[str] | str = (),
    only: Sequence[str] | str = (),
    key: str | None = None,
    encode: str | None = None,
    **rest: Any,
) -> MergeOptions:
    """Options from what people write; raises `ConfigError` for the first value that does not fit."""
    chosen = MASK_METHODS.get(method) or get_method(method)
    base, models = _sources(base, models, chosen, {"rank": rank, "space": space})
    _check_encode(encode, {"base": base, "dtype": dtype, "masks": method if method in MASK_METHODS else None})
    if space is not None and space not in SPACES:
        raise ConfigError(unknown_name("space", shown(space), SPACES))
    if vocabulary not in VOCABULARY:
        raise ConfigError(unknown_name("vocabulary", shown(vocabulary), VOCABULARY))
    _names("method.remove_keys", knobs.get("remove_keys"))
    for key in ("mixed_dtypes", "overwrite"):
        if not isinstance(rest.get(key, False), bool):
            raise ConfigError(f"{key}={shown(rest[key])}: wanted true or false.")
    destination = Destination.of(str(output)) if is_remote(output) else None
    options = MergeOptions(
        base=base,
        models=models,
        method=chosen,
        output=_output(output if destination is None else destination.staging),
        destination=destination,
        knobs=knobs,
        after=tuple(chosen_wrappers(after)),
        dtype=_dtype(dtype),
        shard_size=parse_size("shard_size", shard_size),
        memory=parse_size("memory", memory),
        threads=_whole_number("threads", threads, 0, _MOST_THREADS),
        device=read_device(device),
        part=_part(shard),
        vocabulary=vocabulary,
        allow_non_finite=_names("allow_non_finite", allow_non_finite),
        space=space,
        selection=Selection(_names("frozen", frozen), _names("keep", keep), _names("only", only)),
        key=None if key is None else str(key),
        encode=encode,
        rank=None if rank is None else _whole_number("rank", rank, 1, 2**31),
        **rest,
    )
    if options.masks:
        _check_masks(options)
    return options


def _check_masks(options: MergeOptions) -> None:
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


def _check_encode(encode: Any, given: Mapping[str, Any]) -> None:
    """Refuse values other than input, and what codes of the base leave no room for."""
    if encode is None:
        return
    if encode not in ENCODE:
        raise ConfigError(unknown_name("encode", shown(encode), ENCODE))
    if given["base"] is None or given["masks"] is not None:
        raise ConfigError("encode=input is for a whole merged model. Remedy: leave out encode, or give base=PATH.")
    if given["dtype"] is not None:
        problem = f"encode=input writes the base's codes, and dtype={shown(given['dtype'])} plain weights"
        raise ConfigError(f"{problem}. Remedy: leave out one of the two.")


def parse_size(key: str, value: int | str) -> int:
    """A number of bytes from a number or a text such as 5GB (10⁹) or 512MB.

    >>> parse_size("shard_size", "1.5GB")
    1500000000
    """
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([KMGT]?B|)\s*", str(value).upper()[:40])
    if match is None or float(match[1]) * _UNITS[match[2]] < 1:
        problem = f"{key}={shown(repr(value))} is no size"
        raise ConfigError(f"{problem}. Remedy: give a number of bytes, or one with kB, MB, GB or TB.")
    return int(float(match[1]) * _UNITS[match[2]])


def _sources(
    base: Source | None, models: Any, method: MergeMethod, only: Mapping[str, Any]
) -> tuple[Source | None, Mapping[str, Source]]:
    """Base and models by name; no base where all models are adapters that become one adapter.

    `only` are the keys that nothing else takes.
    """
    if isinstance(models, Sequence) and not isinstance(models, str):
        models = {f"model_{i}": model for i, model in enumerate(models, start=1)}
    if not isinstance(models, Mapping) or not models:
        raise ConfigError("There is no model to merge. Remedy: give models.NAME=PATH at least once.")
    if base is None and all(map(is_adapter, models.values())):
        return None, models
    for key, value in only.items():
        if value is not None:
            remedy = f"leave out {key}, or the base"
            raise ConfigError(f"{key}={shown(value)} is for merging adapters into one adapter. Remedy: {remedy}.")
    return _with_base(base, models, method)


def _with_base(
    base: Source | None, models: Mapping[str, Source], method: MergeMethod
) -> tuple[Source, Mapping[str, Source]]:
    """Without a base the first model says what the result looks like, if the method has no task vectors to take."""
    if base is not None:
        return base, models
    if method.operand == "deltas":
        raise ConfigError(f"{method.name} needs the pretrained model. Remedy: give base=PATH.")
    names = list(models)
    rest = names[1:] if method.num_models[1] < len(names) else names
    return models[names[0]], {name: models[name] for name in rest}


def _output(value: Any) -> Path:
    if not isinstance(value, str | os.PathLike) or not str(value):
        raise ConfigError(f"output={shown(value)}: wanted the path of a folder for the merged model.")
    return Path(value)


def _whole_number(key: str, value: Any, least: int, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        text = shown(repr(value)) if not isinstance(value, int) or abs(value) < 10**30 else "…"
        raise ConfigError(f"{key}={text}: wanted a whole number from {least} to {most}.")
    return value


def _names(key: str, value: Any) -> tuple[str, ...]:
    """A list of names or patterns; one alone may stand for a list."""
    names = [value] if isinstance(value, str) else value or ()
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{key}={shown(value)}: wanted a list of names.")
    return tuple(names)


def _dtype(value: torch.dtype | str | None) -> torch.dtype | None:
    name = shown(value).removeprefix("torch.")
    if value is None:
        return None
    if name not in DTYPES:
        raise ConfigError(unknown_name("dtype", name, DTYPES))
    return getattr(torch, name)


def _part(shard: str | None) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", str(shard or "1/1")[:40])
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f"shard={shown(shard)}: wanted i/n with 1 ≤ i ≤ n, such as 2/4.")
    return int(match[1]), int(match[2])
