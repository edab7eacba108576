"""The adapter_config.json of `peft`: every key that is understood; a LoRA that asks for more is refused by that key."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from suture.checkpoints.json_files import model_config, read_object
from suture.errors import refusal, shown

MERGE_FIRST = "merge it into its base first: PeftModel.from_pretrained(BASE, ADAPTER).merge_and_unload()"
_AGAIN = "copy or download the adapter again"
_DEFAULTS = {"r": 8, "lora_alpha": 8}
#: Keys that say how the adapter was trained, or what its tensors say themselves.
_FREE = {
    *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_type", "peft_version"),
    *("task_type", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("modules_to_save", "ephemeral_gpu_offload", "runtime_config", "megatron_core", "qalora_group_size"),
    *("eva_config", "loftq_config"),
}
#: Initialisations that leave the base's weights as they are; PiSSA, OLoRA, CorDA, LoftQ and others do not.
_HARMLESS_STARTS = ("gaussian", "orthogonal", "eva")
_BIASES = (None, "none", "all", "lora_only")
_LARGEST_RANK, _LARGEST_ALPHA, _MOST_PATTERNS = 1_000_000, 1e9, 10_000
#: Regular expressions of names, classes and alternatives; none with a repeated group, which could take for ever.
_PATTERN = re.compile(r"(?:[\w.^$|()\[\]-]|\\[.dw]|[*+?]){1,500}")
_REPETITION = re.compile(r"(?<!\\)[*+?]")
#: The architectures of transformers with modules that are Conv1D, whose weights are (in, out), and those modules.
_WITH_CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"}
_CONV1D = ("c_attn", "q_attn", "c_proj", "c_fc")


def read_config(path: Path) -> dict[str, Any]:
    """The configuration of a LoRA adapter, checked, with peft's defaults for `r` and `lora_alpha`.

    Raises `CheckpointError` for another kind of adapter and for every key or value that is not understood.
    """
    config = _DEFAULTS | read_object(path, _AGAIN, largest=10_000_000)
    if config.get("peft_type") != "LORA":
        raise refusal(path, f"describes an adapter of type {shown(config.get('peft_type'))!r}, not LoRA", MERGE_FIRST)
    for key, value in config.items():
        if key in _CHECKS and not _CHECKS[key](value):
            remedy = MERGE_FIRST if key == "init_lora_weights" else _AGAIN
            raise refusal(path, f"has {key}={shown(value)}, which is not understood", remedy)
        if key not in _CHECKS and key not in _FREE and value not in (None, False, [], {}, ""):
            raise refusal(path, f"asks for {shown(key)}={shown(value)}, which is not plain LoRA", MERGE_FIRST)
    return config


def scale_of(config: Mapping[str, Any], module: str) -> float:
    """lora_alpha / r, or / √r with rank stabilisation; both may have a pattern of their own for some modules."""
    rank = rank_of(config, module)
    alpha = _patterned(config.get("alpha_pattern"), module, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def rank_of(config: Mapping[str, Any], module: str) -> int:
    """The rank that the configuration gives to a module."""
    return int(_patterned(config.get("rank_pattern"), module, config["r"]))


def is_conv1d(directory: Path | None, module: str) -> bool | None:
    """Whether a module of the model in a directory is a Conv1D; None where no configuration tells."""
    config = model_config(directory)
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    kinds = {str(part["model_type"]) for part in parts if "model_type" in part}
    if not kinds or config.get("auto_map"):  # a model with code of its own may use whatever it likes
        return None
    return bool(kinds & _WITH_CONV1D) and may_be_conv1d(module)


def may_be_conv1d(module: str) -> bool:
    """Whether a module has the name of one that is a Conv1D in some architectures."""
    return module.rpartition(".")[2] in _CONV1D


def _patterned(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default


def _is_flag(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= _LARGEST_RANK


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and -_LARGEST_ALPHA <= value <= _LARGEST_ALPHA  # NaN is not between them


def _are_ranks(value: Any) -> bool:
    return value is None or (_are_patterns(value) and all(map(_is_rank, value.values())))


def _are_alphas(value: Any) -> bool:
    return value is None or (_are_patterns(value) and all(map(_is_alpha, value.values())))


def _are_patterns(value: Any) -> bool:
    return isinstance(value, dict) and len(value) <= _MOST_PATTERNS and all(map(_is_safe_pattern, value))


def _is_safe_pattern(pattern: str) -> bool:
    if not _PATTERN.fullmatch(pattern) or len(_REPETITION.findall(pattern)) > 4 or re.search(r"\)[*+?]", pattern):
        return False
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _leaves_the_base(value: Any) -> bool:
    return _is_flag(value) or (isinstance(value, str) and value.lower() in _HARMLESS_STARTS)


def _is_bias(value: Any) -> bool:
    return value in _BIASES


_CHECKS = {
    "r": _is_rank,
    "lora_alpha": _is_alpha,
    "rank_pattern": _are_ranks,
    "alpha_pattern": _are_alphas,
    "use_rslora": _is_flag,
    "fan_in_fan_out": _is_flag,
    "init_lora_weights": _leaves_the_base,
    "bias": _is_bias,
}
