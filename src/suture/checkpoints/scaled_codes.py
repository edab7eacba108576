"""Codes with scales: FP8 and int8 of compressed-tensors and DeepSeek, int8 of bitsandbytes, MXFP4 of gpt-oss."""

import math

import torch
from torch import Tensor

from suture.checkpoints.encoding import FP4, Grid, mxfp4, rows_of_int8, scaled
from suture.checkpoints.stored_codes import Decoded, Stored, by_rows

_FP8 = {getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2") if hasattr(torch, name)}
_MXFP4 = torch.tensor([*FP4, *(-number for number in FP4)])
_BLOCK = (128, 128)  # of FP8, where the configuration says nothing


def decode_scaled(name: str, stored: Stored) -> Decoded | None:
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
    return Decoded(name, shape, by_rows(columns, decode), takes, kind, encode=encode)


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


def decode_mxfp4(name: str, stored: Stored) -> Decoded | None:
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
        blocks, exponents = stored.read(name).view(experts, out, groups * half), stored.read(scales)
        parts = []
        for expert in range(first // inner, -(-last // inner)):
            begin, end = max(first - expert * inner, 0), min(last - expert * inner, inner)
            g0, g1 = begin // each, -(-end // each)
            codes = blocks[expert, :, begin // 2 : -(-end // 2)]
            pairs = torch.stack([codes & 15, codes >> 4], -1).flatten(1)[:, begin % 2 :][:, : end - begin]
            powers = torch.exp2(exponents[expert, :, g0:g1].float() - 127).repeat_interleave(each, 1)
            parts.append((_MXFP4[pairs.int()] * powers[:, begin - g0 * each : end - g0 * each]).T)
        return torch.cat(parts)

    encode = mxfp4(name, scales, experts, out, groups, half)
    kind = "4-bit codes of MXFP4"
    return Decoded(target, (experts, inner, out), by_rows(out, rows), [name, scales], kind, encode=encode)


def decode_int8(name: str, stored: Stored) -> Decoded | None:
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
    return Decoded(name, spec.shape, by_rows(spec.shape[1], rows), [name, scale], kind, encode=encode)
