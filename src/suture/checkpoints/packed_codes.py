"""Packed codes: nf4 and fp4 of bitsandbytes, and the integers of GPTQ, AWQ and compressed-tensors."""

import json
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from suture.checkpoints.encoding import table_codes
from suture.checkpoints.stored_codes import DTYPES, PLAIN, Decoded, Stored, by_rows
from suture.errors import refusal, shown

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble of each of eight columns


def decode_4bit(name: str, stored: Stored) -> Decoded | None:
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

    dtype = DTYPES.get(str(state.get("dtype")))
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


def decode_packed(name: str, stored: Stored) -> Decoded | None:
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
        raise refusal(stored.where, f"has codes of {bits:g} bits for '{shown(name)}', which are not read", PLAIN)
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
    dtype = grid.dtype if grid.dtype in DTYPES.values() else None
    return Decoded(f"{module}weight", (out, inner), by_rows(inner, rows), takes, kind, dtype)


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


def decode_compressed(name: str, stored: Stored) -> Decoded | None:
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
        raise refusal(stored.where, f"has an order of inputs or zeros for '{shown(weight)}' that are not read", PLAIN)
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
    return Decoded(weight, shape, by_rows(shape[1], rows), [name, scale, size, *([zero] if zero else [])], kind)
