"""What a merge of files is told, checked for what can be checked without opening one."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from suture.checkpoints import Source
from suture.checkpoints.adapters import is_adapter
from suture.errors import ConfigError, unknown_name
from suture.file_merge.tensor_knobs import Rules, settings
from suture.merging.registry import MergeMethod, get_method

VOCABULARY = ("refuse", "base", "crop", "pad", "union")
_DTYPES = ("bfloat16", "float16", "float32", "float64")
_DIGITS = 30  # of a size
_MOST_THREADS = 4096
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class Recipe:
    """Which models are merged, how, and where the result goes. `settings` are the method's knobs, see `Settings`."""

    base: Source | None
    models: Mapping[str, Source]
    method: MergeMethod
    output: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
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
    rank: int | None = None
    translation: Any = None

    @classmethod
    def of(
        cls,
        base: Source | None,
        models: Mapping[str, Source] | Sequence[Source],
        method: str,
        output: str | Path,
        *,
        settings: Mapping[str, Any],
        dtype: torch.dtype | str | None = None,
        shard_size: int | str = "5GB",
        memory: int | str = "300MB",
        device: str = "cpu",
        shard: str | None = None,
        vocabulary: str = "refuse",
        allow_non_finite: Sequence[str] | str = (),
        **rest: Any,
    ) -> "Recipe":
        """Read what people write; raises `ConfigError` for the first value that does not fit."""
        if not isinstance(models, Mapping):
            models = {f"model_{i}": model for i, model in enumerate(models, start=1)}
        if not models:
            raise ConfigError("There is no model to merge. Remedy: give models.NAME=PATH at least once.")
        chosen = get_method(method)
        only_adapters = base is None and all(map(is_adapter, models.values()))
        if not only_adapters:
            base, models = _with_base(base, models, chosen)
            _no_rank(rest.get("rank"))
        for key, least in (("threads", 0), ("rank", 1)):
            told = rest.get(key)
            if told is not None and (not isinstance(told, int) or isinstance(told, bool) or told < least):
                raise ConfigError(f"{key}={told!r}: wanted a whole number, {least} or more.")
        if (rest.get("threads") or 0) > _MOST_THREADS:
            raise ConfigError(f"threads={rest['threads']}: wanted at most {_MOST_THREADS}.")
        if vocabulary not in VOCABULARY:
            raise ConfigError(unknown_name("vocabulary", vocabulary, VOCABULARY))
        return cls(
            base=base,
            models=models,
            method=chosen,
            output=Path(output),
            settings=settings,
            dtype=_dtype(dtype),
            shard_size=size("shard_size", shard_size),
            memory=size("memory", memory),
            device=_device(device),
            part=_part(shard),
            vocabulary=vocabulary,
            allow_non_finite=_patterns(allow_non_finite),
            **rest,
        )

    def rules(self, names: Sequence[str]) -> Rules:
        """The knobs of every tensor."""
        return self.translation.rules(names) if self.translation else settings(self.method, self.settings, names)

    @property
    def adapters(self) -> bool:
        """Whether adapters are merged into one adapter."""
        return self.base is None

    @property
    def frozen(self) -> Sequence[str]:
        """The tensors that stay at the base."""
        return tuple(self.settings.get("remove_keys", ()))

    def may_be_non_finite(self, name: str) -> bool:
        """Whether NaN and Inf are allowed in a tensor."""
        return any(fnmatchcase(name, pattern) for pattern in self.allow_non_finite)


def size(key: str, told: int | str) -> int:
    """A number of bytes from a number or a text such as 5GB (10⁹) or 512MB.

    >>> size("shard_size", "1.5GB")
    1500000000
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?B|)\s*", str(told).upper())
    if match is None or len(match[1]) > _DIGITS or float(match[1]) * _UNITS[match[2]] < 1:
        raise ConfigError(f"{key}={told!r} is no size. Remedy: give a number of bytes, or one with kB, MB, GB or TB.")
    return int(float(match[1]) * _UNITS[match[2]])


def _patterns(value: Any) -> tuple[str, ...]:
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, list | tuple) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ConfigError(f"allow_non_finite={value!r}: wanted names of tensors, such as ['*.running_var'].")
    return tuple(patterns)


def _no_rank(rank: int | None) -> None:
    if rank is not None:
        raise ConfigError(f"rank={rank} is for merging adapters into one adapter. Remedy: leave out rank, or the base.")


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


def _dtype(told: torch.dtype | str | None) -> torch.dtype | None:
    name = str(told).removeprefix("torch.")
    if told is None:
        return None
    if name not in _DTYPES:
        raise ConfigError(unknown_name("dtype", name, _DTYPES))
    return getattr(torch, name)


def _device(told: str) -> str:
    """`cpu`, `cuda` or `cuda:N`, if this PyTorch finds it."""
    kind, _, number = str(told).partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()) or (kind == "cpu" and number):
        raise ConfigError(f"device={told}: wanted cpu, cuda or cuda:N.")
    found = torch.cuda.device_count() if kind == "cuda" else 1
    if int(number or 0) >= found:
        raise ConfigError(f"device={told}: PyTorch {torch.__version__} finds {found} CUDA devices. Remedy: device=cpu.")
    return str(told)


def _part(told: str | None) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", str(told or "1/1"))
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f"shard={told}: wanted i/n with 1 ≤ i ≤ n, such as 2/4.")
    return int(match[1]), int(match[2])
