"""Low-precision weights as plain ones: codes and scales, decoded slice by slice when they are read.

FP8 with scales of tensors, channels, groups or blocks (DeepSeek, compressed-tensors, FBGEMM), int8 of
compressed-tensors and bitsandbytes, nf4 and fp4 of bitsandbytes, GPTQ, AWQ, and MXFP4 as gpt-oss stores it. A decoded
slice is float32; the tensor counts as one of the model's own dtype, by default bfloat16.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from suture.checkpoints.checkpoint import Codes, Entry, TensorSpec
from suture.checkpoints.encoding import Part
from suture.checkpoints.json_files import model_config
from suture.checkpoints.packed_codes import decode_4bit, decode_compressed, decode_packed
from suture.checkpoints.scaled_codes import decode_int8, decode_mxfp4, decode_scaled
from suture.checkpoints.stored_codes import DTYPES, Decoded, Stored

_STEP = 1 << 15  # entries that are decoded at once


def decoded(entries: Mapping[str, Entry], directory: Path | None, where: object) -> tuple[dict[str, Entry], str]:
    """The entries with all codes that are understood decoded, and the formats in words, empty where there are none.

    Raises `CheckpointError` for codes whose scales do not fit.
    """
    config = model_config(directory)
    settings = config.get("quantization_config") or {}
    stored = Stored(entries, settings if isinstance(settings, dict) else {}, where)
    found = [each for name in entries for decode in _DECODERS if (each := decode(name, stored))]
    taken = {name for each in found for name in each.takes}
    taken |= {name for each in found for name in _idle(each.name) if name in entries}
    plain = {name: entry for name, entry in entries.items() if name not in taken}
    dtype = DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), torch.bfloat16)
    plain |= {each.name: _entry(each, dtype, entries) for each in found}
    kinds = {each.kind for each in found} | {entry.codes.kind for entry in plain.values() if entry.codes}
    return plain, " and ".join(sorted(kinds))


def _idle(name: str) -> list[str]:
    """What lies beside the codes of a weight and is for activations or kernels only."""
    module = name.removesuffix("weight")
    return [
        module + part for part in ("input_scale", "input_zero_point", "weight_format", "weight_shape", "weight_g_idx")
    ]


def _entry(each: Decoded, dtype: torch.dtype, entries: Mapping[str, Entry]) -> Entry:
    spec = TensorSpec(each.shape, each.dtype or dtype)
    beside = [name for name in _idle(each.name) if name in entries and name not in each.takes]
    stored = {name: entries[name].spec for name in (*each.takes, *beside)}
    codes = Codes(each.kind, stored, lambda name: entries[name].read(), each.encode)
    part = in_steps(each.part)
    return Entry(spec, lambda: part(0, spec.numel).view(spec.shape).to(spec.dtype), part=part, codes=codes)


def in_steps(decode: Part) -> Part:
    """The same entries, a few at a time, so that what decoding holds beside them stays small."""

    def part(start: int, stop: int) -> Tensor:
        if stop - start <= _STEP:
            entries = decode(start, stop)  # a view would keep whole rows of the neighbours
            return entries.clone() if entries.untyped_storage().nbytes() > 2 * entries.nbytes else entries
        entries = torch.empty(stop - start)
        for begin in range(start, stop, _STEP):
            end = min(begin + _STEP, stop)
            entries[begin - start : end - start] = decode(begin, end)
        return entries

    return part


_DECODERS: tuple[Callable[[str, Stored], Decoded | None], ...] = (
    decode_scaled,
    decode_mxfp4,
    decode_int8,
    decode_4bit,
    decode_packed,
    decode_compressed,
)
