"""Low-precision weights as plain ones: codes and scales, decoded slice by slice when they are read.

FP8 with scales of tensors, channels, groups or blocks (DeepSeek, compressed-tensors, FBGEMM), int8 of
compressed-tensors and bitsandbytes, nf4 and fp4 of bitsandbytes, GPTQ, AWQ, and MXFP4 as gpt-oss stores it. A decoded
slice is float32; the tensor counts as one of the model's own dtype, by default bfloat16.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from suture.checkpoints.checkpoint import Codes, Entry, TensorSpec
from suture.checkpoints.encoding import FP4, Encoder, Grid, Part, mxfp4, rows_of_int8, scaled, table_codes
from suture.checkpoints.json_files import model_config
from suture.errors import refusal, shown

#: Decodes some rows of a matrix (rows, columns): (first, last) → float32.
RowPart = Callable[[int, int], Float[Tensor, "rows columns"]]

_FP8 = {getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2") if hasattr(torch, name)}
_MXFP4 = torch.tensor([*FP4, *(-number for number in FP4)])
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble of each of eight columns
_BLOCK = (128, 128)  # of FP8, where the configuration says nothing
_STEP = 1 << 15  # entries that are decoded at once
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_AGAIN = "copy or download the model again"


class Decoded(NamedTuple):
    """One decoded tensor: its name, its shape, its entries, the stored names that it takes, and the format in words.

    `dtype` is its own, where it says so; `encode` writes such codes again, where that is known.
    """

    name: str
    shape: tuple[int, ...]
    part: Part
    takes: Sequence[str]
    kind: str
    dtype: torch.dtype | None = None
    encode: Encoder | None = None


class Stored(NamedTuple):
    """The stored tensors of a checkpoint and the quantization_config of its config.json."""

    entries: Mapping[str, Entry]
    settings: Mapping[str, Any]
    where: object

    def spec(self, name: str) -> TensorSpec | None:
        """Shape and dtype of a stored tensor; None where there is none."""
        entry = self.entries.get(name)
        return None if entry is None else entry.spec

    def read(self, name: str) -> Tensor:
        """A stored tensor."""
        return self.entries[name].read()

    def wrong(self, name: str, found: str) -> Exception:
        return refusal(self.where, f"has {found} for '{shown(name)}'", _AGAIN)


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
    dtype = _DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), torch.bfloat16)
    plain |= {each.name: _entry(each, dtype, entries) for each in found}
    kinds = {each.kind for each in found} | {entry.codes.kind for entry in plain.values() if entry.codes}
    return plain, " and ".join(sorted(kinds))


def _idle(name: str) -> list[str]:
    """The tensors beside the codes of a weight that are for activations or kernels only."""
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


def _by_rows(columns: int, rows: RowPart) -> Part:
    """Some entries of a flattened matrix, from its rows."""

    def part(start: int, stop: int) -> Tensor:
        if start >= stop:
            return torch.empty(0)
        first, last = start // columns, -(-stop // columns)
        return rows(first, last).reshape(-1)[start - first * columns : stop - first * columns]

    return part


def _scaled(name: str, stored: Stored) -> Decoded | None:
    """FP8 or int8 codes with a scale for the tensor, for each row, for groups of a row, or for blocks."""
    spec = stored.spec(name)
    scale = next((s for s in _scale_names(name) if s in stored.entries), None)
    coded = spec is not None and (spec.dtype in _FP8 or spec.dtype == torch.int8)
    if spec is None or scale is None or not coded or len(spec.shape) < 2:
        return None
    if spec.dtype == torch.int8 and scale.endswith("_scale_inv"):
        return None  # pairs of 4-bit floating-point codes
    shape, grid = spec.shape, stored.entries[scale].spec.shape
    zero = f"{name}_zero_point" if f"{name}_zero_point" in stored.entries else None
    height, width = _steps(name, shape, grid, stored)
    rows, columns = math.prod(shape[:-1]), shape[-1]
    high, wide = shape[-2], math.ceil(columns / width)
    tall = math.ceil(high / height)

    def decode(first: int, last: int) -> Tensor:
        codes = stored.read(name).view(rows, columns)[first:last].float()
        numbers = torch.arange(first, last)
        lines = numbers // high * tall + numbers % high // height if math.prod(grid) > 1 else torch.zeros_like(numbers)
        spread = lambda tensor: _number(tensor.reshape(-1, wide)[lines]).repeat_interleave(width, 1)[:, :columns]
        if zero is not None:
            codes = codes - spread(stored.read(zero))
        return codes * spread(stored.read(scale))

    kind = "int8 codes with scales" if spec.dtype == torch.int8 else "8-bit floating-point codes with scales"
    takes = [name, scale, *([zero] if zero else [])]
    whole = math.prod(grid) == 1
    division = Grid(rows, columns, rows if whole else high, min(height, rows if whole else high), width)
    encode = scaled(name, scale, zero, division)
    return Decoded(name, shape, _by_rows(columns, decode), takes, kind, encode=encode)


def _number(scales: Tensor) -> Tensor:
    """Scales in float32; a uint8 is the power of 2 that MX formats store."""
    return torch.exp2(scales.float() - 127) if scales.dtype == torch.uint8 else scales.float()


def _scale_names(name: str) -> list[str]:
    return [f"{name}_scale_inv", f"{name}_scale"]


def _steps(name: str, shape: tuple[int, ...], grid: tuple[int, ...], stored: Stored) -> tuple[int, int]:
    """The rows and columns that share a scale; refuses scales that fit no division of a tensor."""
    columns, high, stack = shape[-1], shape[-2], shape[:-2]
    if math.prod(grid) == 1:
        return max(1, math.prod(shape)), columns
    if grid == shape[:-1]:
        return 1, columns
    if len(shape) == 3 and grid == shape[:1]:
        return high, columns
    if len(grid) == len(shape) and grid[:-2] == stack:
        given = stored.settings.get("weight_block_size") or _BLOCK
        for height, width in (tuple(given), (1, columns), (1, -(-columns // grid[-1])), _even(shape, grid)):
            if height > 0 and width > 0 and grid[-2:] == (math.ceil(high / height), math.ceil(columns / width)):
                return int(height), int(width)
    raise stored.wrong(name, f"scales of shape {grid}, which divide no tensor of shape {shape},")


def _even(shape: tuple[int, ...], grid: tuple[int, ...]) -> tuple[int, int]:
    height, width = shape[-2] // max(1, grid[-2]), shape[-1] // max(1, grid[-1])
    return (height, width) if height * grid[-2] == shape[-2] and width * grid[-1] == shape[-1] else (0, 0)


def _mxfp4(name: str, stored: Stored) -> Decoded | None:
    """MXFP4 as gpt-oss stores its experts: blocks (expert, out, group, 16) of two codes a byte, scales 2^(s − 127).

    The decoded tensor is (expert, in, out), as the model holds it.
    """
    target, scales = name.removesuffix("_blocks"), f"{name.removesuffix('_blocks')}_scales"
    spec = stored.spec(name)
    if spec is None or target == name or scales not in stored.entries or spec.dtype != torch.uint8:
        return None
    if len(spec.shape) != 4 or stored.entries[scales].spec.shape != spec.shape[:3]:
        raise stored.wrong(target, f"blocks {spec.shape} and scales {stored.entries[scales].spec.shape}")
    experts, out, groups, half = spec.shape
    each = 2 * half
    inner = groups * each

    def rows(first: int, last: int) -> Tensor:
        """Rows of the (expert · in, out) matrix: columns of one expert's codes."""
        blocks, exponents = stored.read(name), stored.read(scales)
        parts = []
        for expert in range(first // inner, -(-last // inner)):
            begin, end = max(first - expert * inner, 0), min(last - expert * inner, inner)
            g0, g1 = begin // each, -(-end // each)
            codes = blocks[expert, :, g0:g1]
            pairs = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
            powers = torch.exp2(exponents[expert, :, g0:g1].float() - 127)
            values = (_MXFP4[pairs.long()] * powers[..., None]).flatten(1)
            parts.append(values[:, begin - g0 * each : end - g0 * each].T)
        return torch.cat(parts)

    encode = mxfp4(name, scales, experts, out, groups, half)
    kind = "4-bit codes of MXFP4"
    return Decoded(target, (experts, inner, out), _by_rows(out, rows), [name, scales], kind, encode=encode)


def _bnb_int8(name: str, stored: Stored) -> Decoded | None:
    """int8 of bitsandbytes: a row is its codes times SCB / 127."""
    spec, scale = stored.spec(name), f"{name.removesuffix('weight')}SCB"
    if spec is None or not name.endswith("weight") or spec.dtype != torch.int8 or scale not in stored.entries:
        return None
    if len(spec.shape) != 2 or stored.entries[scale].spec.shape != spec.shape[:1]:
        raise stored.wrong(name, f"codes {spec.shape} and SCB {stored.entries[scale].spec.shape}")

    def rows(first: int, last: int) -> Tensor:
        return stored.read(name)[first:last].float() * (stored.read(scale)[first:last].float() / 127)[:, None]

    encode = rows_of_int8(name, scale, *spec.shape)
    kind = "int8 codes of bitsandbytes"
    return Decoded(name, spec.shape, _by_rows(spec.shape[1], rows), [name, scale], kind, encode=encode)


def _bnb_4bit(name: str, stored: Stored) -> Decoded | None:
    """nf4 and fp4 of bitsandbytes: two codes a byte, the first in its upper half; scales may be 8-bit themselves."""
    states = [
        key for key in (f"{name}.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")) if key in stored.entries
    ]
    if not states:
        return None
    state = _quant_state(name, states[0], stored)
    shape, size = tuple(state["shape"]), int(state["blocksize"])
    numel = math.prod(shape)
    parts = [f"{name}.{part}" for part in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")]
    takes = [name, states[0], *(part for part in parts if part in stored.entries)]
    codes, absmax, table = stored.spec(name), stored.spec(parts[0]), stored.spec(parts[1])
    nested = parts[2] in stored.entries
    if codes is None or absmax is None or table is None or table.numel != 16 or codes.dtype != torch.uint8:
        raise stored.wrong(name, "4-bit codes without their scales or their table")
    if codes.numel != -(-numel // 2) or absmax.numel != -(-numel // size):
        raise stored.wrong(name, f"{codes.numel} bytes of codes and {absmax.numel} scales, not those of {shape},")

    def part(start: int, stop: int) -> Tensor:
        pairs = stored.read(name).view(-1)[start // 2 : -(-stop // 2)]
        indices = torch.stack([pairs >> 4, pairs & 15], -1).view(-1)[start % 2 : start % 2 + stop - start]
        numbers = torch.arange(start, stop) // size
        scales = stored.read(parts[0]).view(-1)[numbers[0] : numbers[-1] + 1] if stop > start else torch.empty(0)
        if nested and stop > start:
            above = torch.arange(int(numbers[0]), int(numbers[-1]) + 1) // int(state["nested_blocksize"])
            scales = stored.read(parts[3]).float()[scales.long()] * stored.read(parts[2]).float().view(-1)[above]
            scales = scales + float(state["nested_offset"])
        values = stored.read(parts[1]).float().view(-1)[indices.long()]
        return values * scales.float()[numbers - numbers[0]] if stop > start else values

    dtype = _DTYPES.get(str(state.get("dtype")))
    encode = None if nested else table_codes(name, parts[0], lambda: stored.read(parts[1]), numel, size)
    return Decoded(name, shape, part, takes, f"{state['quant_type']} codes of bitsandbytes", dtype, encode)


def _quant_state(name: str, key: str, stored: Stored) -> dict[str, Any]:
    """The record that bitsandbytes keeps beside 4-bit codes; refuses one that is damaged."""
    try:
        state = json.loads(bytes(stored.read(key).tolist()))
        sizes = [*state["shape"], state["blocksize"], state.get("nested_blocksize", 1)]
        if all(type(size) is int and 0 < size < 2**40 for size in sizes) and isinstance(state["quant_type"], str):
            return state
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise stored.wrong(name, "a damaged quant_state")


def _packed(name: str, stored: Stored) -> Decoded | None:
    """GPTQ and AWQ: integers packed into int32, (in, out) with a scale and a zero for each group of inputs.

    GPTQ packs along the inputs, and its first version stores zeros less 1; AWQ packs along the outputs, interleaved.
    """
    module = name.removesuffix("qweight")
    scales, zeros, order = f"{module}scales", f"{module}qzeros", f"{module}g_idx"
    spec, grid, other = stored.spec(name), stored.spec(scales), stored.spec(zeros)
    if module == name or spec is None or grid is None or other is None or spec.dtype != torch.int32:
        return None
    if min(map(len, (spec.shape, grid.shape, other.shape))) < 2 or not grid.shape[1]:
        raise stored.wrong(name, f"codes {spec.shape}, zeros {other.shape} and scales {grid.shape}")
    bits = 32 * other.shape[1] / grid.shape[1]
    if bits not in (2, 4, 8):
        raise refusal(stored.where, f"has codes of {bits:g} bits for '{shown(name)}', which are not read", _PLAIN)
    bits = int(bits)
    per, out = 32 // bits, grid.shape[1]
    awq = spec.shape[1] * per == out and (bits == 4) and spec.shape[1] != out
    inner = spec.shape[0] if awq else spec.shape[0] * per
    if (not awq and spec.shape[1] != out) or inner % grid.shape[0] or other.shape[0] != grid.shape[0]:
        raise stored.wrong(name, f"codes {spec.shape}, zeros {other.shape} and scales {grid.shape}")
    v1 = stored.settings.get("checkpoint_format", "gptq") != "gptq_v2" and not awq
    shifts = _shifts(bits, awq)
    groups = _groups(stored, order if order in stored.entries and not awq else None, inner, grid.shape[0], name)

    def rows(first: int, last: int) -> Tensor:
        """Rows of the (out, in) weight: columns of the codes."""
        begin, end = first // per, -(-last // per)
        if awq:
            codes = _unpack(stored.read(name)[:, begin:end], shifts, bits).flatten(1)[
                :, first - begin * per : last - begin * per
            ]
        else:
            codes = _unpack(stored.read(name)[:, first:last], shifts, bits).transpose(1, 2).flatten(0, 1)
        zero = _unpack(stored.read(zeros)[:, begin:end], shifts, bits).flatten(1)[
            :, first - begin * per : last - begin * per
        ]
        zero = (zero + v1) & (2**bits - 1)
        group = groups()
        return ((codes - zero[group]).float() * stored.read(scales)[:, first:last].float()[group]).T

    takes = [name, scales, zeros, *([order] if order in stored.entries else [])]
    kind = f"{bits}-bit codes of {'AWQ' if awq else 'GPTQ'}"
    dtype = grid.dtype if grid.dtype in _DTYPES.values() else None
    return Decoded(f"{module}weight", (out, inner), _by_rows(inner, rows), takes, kind, dtype)


_PLAIN = "give the model in float32, bfloat16 or float16"


def _shifts(bits: int, awq: bool) -> Tensor:
    order = _AWQ_ORDER if awq else range(32 // bits)
    return torch.tensor([bits * place for place in order], dtype=torch.int32)


def _unpack(packed: Tensor, shifts: Tensor, bits: int) -> Tensor:
    """(a, b) int32 → (a, b, integers in each)."""
    return (packed[..., None] >> shifts) & (2**bits - 1)


def _groups(stored: Stored, order: str | None, inner: int, count: int, name: str) -> Callable[[], Tensor]:
    """The group of every input."""
    if order is None:
        return lambda: torch.arange(inner) // (inner // count)
    spec = stored.spec(order)
    if spec is None or spec.shape != (inner,):
        raise stored.wrong(name, "a g_idx of another length")

    @cache
    def groups() -> Tensor:
        numbers = stored.read(order).long()
        if int(numbers.min()) < 0 or int(numbers.max()) >= count:
            raise stored.wrong(name, "a g_idx that leads beyond its scales")
        return numbers

    return groups


def _compressed(name: str, stored: Stored) -> Decoded | None:
    """Integers of compressed-tensors (pack-quantized): packed along the inputs into int32."""
    weight = name.removesuffix("_packed")
    scale, size = f"{weight}_scale", f"{weight}_shape"
    spec, grid = stored.spec(name), stored.spec(scale)
    if weight == name or spec is None or grid is None or size not in stored.entries or spec.dtype != torch.int32:
        return None
    shape = tuple(int(each) for each in stored.read(size).tolist())
    per = next((p for p in (8, 4, 16) if len(shape) == 2 and spec.shape == (shape[0], -(-shape[1] // p))), None)
    if per is None or len(grid.shape) != 2 or grid.shape[0] != shape[0] or shape[1] % grid.shape[1]:
        raise stored.wrong(weight, f"codes {spec.shape} and scales {grid.shape}")
    groups = grid.shape[1]
    bits, width = 32 // per, shape[1] // groups
    zero = f"{weight}_zero_point" if f"{weight}_zero_point" in stored.entries else None
    fits = zero is None or stored.entries[zero].spec.shape == (-(-shape[0] // per), groups)
    if f"{weight}_g_idx" in stored.entries or not fits:
        raise refusal(stored.where, f"has an order of inputs or zeros for '{shown(weight)}' that are not read", _PLAIN)
    shifts = _shifts(bits, False)

    def zeros(first: int, last: int) -> Tensor:
        """The zeros of some rows: packed along the rows."""
        packed = stored.read(zero)[first // per : -(-last // per)] if zero else None
        if packed is None:
            return torch.full((last - first, groups), 2 ** (bits - 1))
        unpacked = _unpack(packed, shifts, bits).transpose(1, 2).flatten(0, 1)
        return unpacked[first % per : first % per + last - first]

    def rows(first: int, last: int) -> Tensor:
        codes = _unpack(stored.read(name)[first:last], shifts, bits).flatten(1)[:, : shape[1]]
        codes = codes - zeros(first, last).repeat_interleave(width, 1)
        return codes.float() * stored.read(scale)[first:last].float().repeat_interleave(width, 1)

    kind = f"{bits}-bit codes of compressed-tensors"
    return Decoded(weight, shape, _by_rows(shape[1], rows), [name, scale, size, *([zero] if zero else [])], kind)


_DECODERS: tuple[Callable[[str, Stored], Decoded | None], ...] = (
    _scaled,
    _mxfp4,
    _bnb_int8,
    _bnb_4bit,
    _packed,
    _compressed,
)
