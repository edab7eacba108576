"""The adapter_config.json of `peft`: every key that is understood, by kind of adapter; all else is refused by name."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from suture.checkpoints.json_files import model_config, read_object
from suture.errors import refusal, shown

MERGE_FIRST = "merge it into its base first: PeftModel.from_pretrained(BASE, ADAPTER).merge_and_unload()"
_AGAIN = "copy or download the adapter again"
#: Keys that say how an adapter was trained, or what its tensors say themselves.
_FREE = {
    *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_type", "peft_version"),
    *("task_type", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
}
_LYCORIS = {"r", "alpha", "rank_pattern", "alpha_pattern", "rank_dropout", "module_dropout", "init_weights"}
#: Kind of adapter → the further keys that are understood.
KINDS: dict[str, set[str]] = {
    "LORA": {
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "init_lora_weights"),
        *("bias", "lora_bias", "use_dora", "trainable_token_indices", "target_parameters", "lora_dropout"),
        *("ephemeral_gpu_offload", "runtime_config", "megatron_core", "qalora_group_size", "eva_config"),
        "loftq_config",
    },
    "ADALORA": {
        *("r", "init_r", "target_r", "lora_alpha", "rank_pattern", "fan_in_fan_out", "bias", "init_lora_weights"),
        *("tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step", "lora_dropout"),
        *("ephemeral_gpu_offload", "runtime_config", "megatron_core", "qalora_group_size", "eva_config"),
        "loftq_config",
    },
    "IA3": {"feedforward_modules", "fan_in_fan_out", "init_ia3_weights"},
    "LOHA": {*_LYCORIS, "use_effective_conv2d"},
    "LOKR": {*_LYCORIS, "use_effective_conv2d", "decompose_both", "decompose_factor", "rank_dropout_scale"},
    "VERA": {
        *("r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial", "fan_in_fan_out", "bias"),
        "init_weights",
    },
    "TRAINABLE_TOKENS": {"token_indices", "init_weights"},
    "LN_TUNING": set(),
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "LORA": {"r": 8, "lora_alpha": 8},
    "ADALORA": {"r": 8, "init_r": 12, "lora_alpha": 8},
    "LOHA": {"r": 8, "alpha": 8},
    "LOKR": {"r": 8, "alpha": 8},
    "VERA": {"r": 256, "projection_prng_key": 0},
}
#: Initialisations that leave the base's weights as they are.
_HARMLESS_STARTS = ("gaussian", "orthogonal", "eva", "mica")
#: Initialisations that take a part of the base away which the base alone determines.
UNDONE_STARTS = ("pissa", "olora")
#: Initialisations that changed the base by what the adapter does not hold, and what that is.
_LOST_STARTS = {
    "pissa_niter": "took a randomised decomposition away from the base",
    "corda": "took away from the base what the activations of its training data gave",
    "loftq": "quantised the base",
    "lora_ga": "took away from the base what the gradients of its training data gave",
}
_LARGEST_RANK, _LARGEST_ALPHA, _MOST_PATTERNS = 1_000_000, 1e9, 10_000
#: Regular expressions of names, classes and alternatives; none with a repeated group, which could take for ever.
_PATTERN = re.compile(r"(?:[\w.^$|()\[\]-]|\\[.dw]|[*+?]){1,500}")
_REPETITION = re.compile(r"(?<!\\)[*+?]")
#: The architectures of transformers with modules that are Conv1D, whose weights are (in, out), and those modules.
_WITH_CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"}
_CONV1D = ("c_attn", "q_attn", "c_proj", "c_fc")


def read_config(path: Path) -> dict[str, Any]:
    """The configuration of an adapter, checked, with peft's defaults for ranks and their factors.

    Raises `CheckpointError` for a kind of adapter that is not read, and for every key or value that is not understood.
    """
    config = read_object(path, _AGAIN, largest=10_000_000)
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in KINDS:
        read = ", ".join(sorted(KINDS))
        raise refusal(path, f"describes an adapter of type {shown(kind)!r}; {read} are read", MERGE_FIRST)
    config = _DEFAULTS.get(kind, {}) | config
    checks = _CHECKS | _CHECKS_OF.get(kind, {})
    for key, value in config.items():
        if key in KINDS[kind] and key in checks and not checks[key](value):
            raise _not_understood(path, key, value)
        if key not in KINDS[kind] and key not in _FREE and value not in (None, False, [], {}, ""):
            raise refusal(path, f"asks for {shown(key)}={shown(value)}, which is not known to {kind} here", MERGE_FIRST)
    return config


def _not_understood(path: Path, key: str, value: Any) -> Exception:
    """The refusal of a value, with what it did to the base where that is known."""
    if key != "init_lora_weights":
        return refusal(path, f"has {key}={shown(value)}, which is not understood", _AGAIN)
    lost = next((what for start, what in _LOST_STARTS.items() if str(value).lower().startswith(start)), None)
    found = f"has {key}={shown(value)}, which {lost or 'is not understood'}"
    convert = "save it with save_pretrained(…, path_initial_model_for_weight_conversion=INITIAL)"
    return refusal(path, found, f"{convert}, or {MERGE_FIRST}")


def scale_of(config: Mapping[str, Any], module: str) -> float:
    """alpha / r, or / √r with rank stabilisation; both may have a pattern of their own for some modules."""
    rank = rank_of(config, module)
    alpha = _patterned(config.get("alpha_pattern"), module, config.get("lora_alpha", config.get("alpha")))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def rank_of(config: Mapping[str, Any], module: str) -> int:
    """The rank that the configuration gives to a module."""
    return int(_patterned(config.get("rank_pattern"), module, config["r"]))


def adalora_rank(config: Mapping[str, Any], module: str) -> int:
    """The rank that AdaLoRA left to a module: that of the entries that its pattern keeps, or the first rank."""
    kept = (config.get("rank_pattern") or {}).get(f"{module}.lora_E")
    return config["init_r"] if kept is None else sum(kept)


def adalora_scale(config: Mapping[str, Any]) -> float:
    """alpha over the first rank, whatever ranks were left, with the 10⁻⁵ that peft adds there."""
    alpha, rank = config["lora_alpha"], config["init_r"]
    return (alpha if alpha > 0 else rank) / (rank + 1e-5)


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


def start_of(config: Mapping[str, Any]) -> str | None:
    """The initialisation that has to be undone: one of `UNDONE_STARTS`, or None."""
    start = config.get("init_lora_weights")
    return start.lower() if isinstance(start, str) and start.lower() in UNDONE_STARTS else None


def is_feedforward(config: Mapping[str, Any], module: str) -> bool:
    """Whether IA³ scales the inputs of a module, and not its outputs."""
    named = config.get("feedforward_modules") or []
    if isinstance(named, str):
        return re.fullmatch(named, module) is not None
    return any(module == each or module.endswith(f".{each}") for each in named)


def token_rows(config: Mapping[str, Any], module: str) -> list[int] | None:
    """The rows of a module's table that the configuration says were trained; None where it names other modules."""
    rows = config.get("trainable_token_indices") or config.get("token_indices")
    if isinstance(rows, dict):
        return next((each for name, each in rows.items() if module == name or module.endswith(f".{name}")), None)
    return rows


def _patterned(patterns: Mapping[str, float] | None, module: str, default: Any) -> Any:
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


def _are_masks(value: Any) -> bool:
    """Whether a value is AdaLoRA's pattern: for every module, which of its first ranks were kept."""
    if value is None or not isinstance(value, dict) or len(value) > _MOST_PATTERNS:
        return value is None
    return all(isinstance(mask, list) and all(isinstance(kept, bool) for kept in mask) for mask in value.values())


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
    return _is_flag(value) or (isinstance(value, str) and value.lower() in (*_HARMLESS_STARTS, *UNDONE_STARTS))


def _is_bias(value: Any) -> bool:
    return value in (None, "none", "all", "lora_only", "vera_only")


def _are_names(value: Any) -> bool:
    names = isinstance(value, list) and len(value) <= _MOST_PATTERNS and all(isinstance(each, str) for each in value)
    return value is None or names or (isinstance(value, str) and _is_safe_pattern(value))


def _are_rows(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(name, str) and _are_rows(rows) for name, rows in value.items())
    return value is None or (isinstance(value, list) and all(type(row) is int and row >= 0 for row in value))


def _is_key(value: Any) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


_CHECKS = {
    "r": _is_rank,
    "init_r": _is_rank,
    "lora_alpha": _is_alpha,
    "alpha": _is_alpha,
    "rank_pattern": _are_ranks,
    "alpha_pattern": _are_alphas,
    "use_rslora": _is_flag,
    "use_dora": _is_flag,
    "lora_bias": _is_flag,
    "fan_in_fan_out": _is_flag,
    "init_lora_weights": _leaves_the_base,
    "bias": _is_bias,
    "feedforward_modules": _are_names,
    "target_parameters": _are_names,
    "trainable_token_indices": _are_rows,
    "token_indices": _are_rows,
    "projection_prng_key": _is_key,
}
#: Keys that mean something else to a kind of adapter.
_CHECKS_OF: dict[str, dict[str, Any]] = {"ADALORA": {"rank_pattern": _are_masks, "init_lora_weights": _is_flag}}
