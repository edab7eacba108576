"""Quantised checkpoints that are not decoded, recognised by the tensors they hold.

Codes are not weights: neither they nor their scales can be merged.
"""

from collections.abc import Mapping
from typing import Any

import torch

from suture.checkpoints.checkpoint import Checkpoint, TensorSpec
from suture.checkpoints.json_files import model_config
from suture.errors import problem, shown

_PLAIN = "give the model in float32, bfloat16 or float16; transformers makes it of most by `model.dequantize()`"
#: The end of a name → the format that stores such a tensor beside its codes.
_FORMATS = {
    ".SCB": "8-bit weights of bitsandbytes",
    ".weight_format": "8-bit weights of bitsandbytes",
    ".absmax": "4-bit weights of bitsandbytes",
    ".nested_absmax": "4-bit weights of bitsandbytes",
    ".quant_map": "4-bit weights of bitsandbytes",
    ".qweight": "4-bit weights of GPTQ or AWQ",
    ".qzeros": "4-bit weights of GPTQ or AWQ",
    ".W_q": "weights of HQQ",
    ".weight_packed": "packed weights of compressed-tensors",
    ".weight_scale_inv": "8-bit floating-point weights with scales",
    "._data": "weights of quanto",
    "._packed_params": "weights that PyTorch quantised",
    "._packed_params._packed_params": "weights that PyTorch quantised",
}
_SCALES = {
    "scale",
    "scales",
    "weight_scale",
    "weight_scales",
    "input_scale",
    "zero_point",
    "weight_zero_point",
    "zeros",
}
_CODED = ("weight", "qweight", "weight_packed", "_data", "data", "packed", "W_q")  # where the codes of such scales are
_CODES = {torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64} | {
    getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu") if hasattr(torch, name)
}


def quantisation(specs: Mapping[str, TensorSpec]) -> str | None:
    """The kind of quantisation that these tensors are stored in, in words; None for plain weights.

    >>> quantisation({"h.weight": TensorSpec((2, 2), torch.int8), "h.SCB": TensorSpec((2,), torch.float32)})
    "8-bit weights of bitsandbytes, such as 'h.SCB'"
    """
    for kind_of in (_format, _scaled):
        for name in specs:
            if kind := kind_of(name, specs):
                return f"{kind}, such as '{shown(name)}'"
    return None


def quantised_problem(checkpoint: Checkpoint) -> str | None:
    """Why a checkpoint cannot be merged, if it is quantised and not decoded: by its tensors, or by its config.json."""
    if checkpoint.quantised:
        return problem(checkpoint.label, f"holds {checkpoint.quantised}", _PLAIN)
    if checkpoint.decoded:
        return None
    settings: Any = model_config(checkpoint.directory).get("quantization_config")
    if not settings:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    kind = f" by {shown(method)}" if method else ""
    remedy = f"{_PLAIN}; where these weights are plain ones, remove quantization_config from config.json"
    return problem(checkpoint.label, f"is quantised{kind}, as the quantization_config in its config.json says", remedy)


def _format(name: str, specs: Mapping[str, TensorSpec]) -> str | None:
    """The format that stores a tensor of this name beside its codes."""
    if ".quant_state." in name:
        return "4-bit weights of bitsandbytes"
    if name.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in specs:
        return "4-bit weights of MXFP4" if specs[name].dtype == torch.uint8 else None
    return next((kind for ending, kind in _FORMATS.items() if name.endswith(ending)), None)


def _scaled(name: str, specs: Mapping[str, TensorSpec]) -> str | None:
    """Any other format: a scale that lies beside codes."""
    module, _, last = name.rpartition(".")
    beside = [f"{module}.{part}" if module else part for part in _CODED]
    return "codes with scales" if last in _SCALES and any(_is_code(specs.get(each)) for each in beside) else None


def _is_code(spec: TensorSpec | None) -> bool:
    return spec is not None and spec.dtype in _CODES
