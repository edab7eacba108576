"""Encoding of plain weights in the codes that a checkpoint stores, slice by slice.

Scales are the smallest that reach the largest weight of their tensor, row, group or block; codes are the nearest.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

#: Some entries of a flattened tensor: (start, stop) → float32.
Part = Callable[[int, int], Tensor]

_SLICE = 1 << 18  # entries that are encoded at once
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # what a code of MXFP4 may be, without its sign
_FP4_STEPS = torch.tensor([(a + b) / 2 for a, b in zip(FP4, FP4[1:], strict=False)])


class Encoder(NamedTuple):
    """Writes the codes of a tensor: the stored names that it fills, and `run(part, stored)`, which fills them."""

    fills: Sequence[str]
    run: Callable[[Part, Mapping[str, Tensor]], None]


class Grid(NamedTuple):
    """The division of a matrix (rows, columns): every `high` rows begin anew, and height × width share a scale."""

    rows: int
    columns: int
    high: int
    height: int
    width: int

    @property
    def wide(self) -> int:
        """The number of scales side by side."""
        return math.ceil(self.columns / self.width)

    def lines(self) -> Iterator[tuple[int, int, int, int]]:
        """Runs of lines of blocks that are encoded at once: first line, their number, first row, end of the rows."""
        tall = math.ceil(self.high / self.height)
        several = max(1, _SLICE // (self.height * self.columns))
        for begin in range(0, self.rows, self.high):
            for line in range(0, tall, several):
                count = min(several, tall - line)
                first, last = line * self.height, min((line + count) * self.height, self.high)
                yield begin // self.high * tall + line, count, begin + first, begin + last

    def bounds(self, values: Float[Tensor, "rows columns"], count: int) -> tuple[Tensor, Tensor]:
        """The least and the largest of 0 and every block's weights, each (lines, blocks)."""
        height = self.height if count > 1 else len(values)
        rows, columns = count * height - len(values), self.wide * self.width - self.columns
        blocks = torch.nn.functional.pad(values, (0, columns, 0, rows)).view(count, height, self.wide, self.width)
        return blocks.amin((1, 3)).clamp(max=0), blocks.amax((1, 3)).clamp(min=0)

    def spread(self, scales: Float[Tensor, "lines blocks"], rows: int) -> Float[Tensor, "rows columns"]:
        """The scale of every weight."""
        height = self.height if len(scales) > 1 else rows
        return scales.repeat_interleave(height, 0)[:rows].repeat_interleave(self.width, 1)[:, : self.columns]


def scaled(codes: str, scale: str, zero: str | None, grid: Grid) -> Encoder:
    """FP8 or int8 codes with a scale for each block of a grid, and with a zero where there is a name for it."""

    def run(part: Part, stored: Mapping[str, Tensor]) -> None:
        matrix = stored[codes].view(grid.rows, grid.columns)
        scales = stored[scale].view(-1, grid.wide)
        zeros = stored[zero].view(-1, grid.wide) if zero else None
        for line, count, first, last in grid.lines():
            pieces = list(_pieces(first, last, grid.columns))
            least, most = _joined_bounds(part, pieces, grid, count)
            steps = _steps(least, most, matrix.dtype, scales.dtype, symmetric=zeros is None)
            scales[line : line + count] = _stored_scale(steps, scales.dtype)
            offset = None
            if zeros is not None:
                offset = (-128 - least / steps).round().clamp(-128, 127)
                zeros[line : line + count] = offset.to(zeros.dtype)
            for a, b in pieces:
                values = part(a * grid.columns, b * grid.columns).view(-1, grid.columns)
                moved = 0 if offset is None else grid.spread(offset, b - a)
                matrix[a:b] = _nearest(values / grid.spread(steps, b - a) + moved, matrix.dtype)

    return Encoder([codes, scale, *([zero] if zero else [])], run)


def _pieces(first: int, last: int, columns: int) -> Iterator[tuple[int, int]]:
    """Rows that are read at once: all of several lines of blocks, some of one that is large."""
    step = max(1, _SLICE // columns)
    step = last - first if last - first <= 2 * step else step
    for row in range(first, last, step):
        yield row, min(row + step, last)


def _joined_bounds(part: Part, pieces: Sequence[tuple[int, int]], grid: Grid, count: int) -> tuple[Tensor, Tensor]:
    """The bounds of lines of blocks that are read in pieces; of several pieces, all are of one line."""
    found = [grid.bounds(part(a * grid.columns, b * grid.columns).view(-1, grid.columns), count) for a, b in pieces]
    return torch.stack([a for a, _ in found]).amin(0), torch.stack([b for _, b in found]).amax(0)


def _steps(least: Tensor, most: Tensor, codes: torch.dtype, dtype: torch.dtype, *, symmetric: bool) -> Tensor:
    """The scales in float32, as `dtype` will hold them: they reach from −largest to largest, or from least to most."""
    top = 127.0 if codes == torch.int8 else torch.finfo(codes).max
    steps = torch.maximum(-least, most) / top if symmetric else (most - least) / 255
    steps = torch.where(steps > 0, steps, 1.0)
    if _is_power(dtype):
        return torch.exp2(torch.log2(steps).ceil().clamp(-127, 127))
    rounded = steps.to(dtype).float()
    return torch.where(rounded > 0, rounded, torch.finfo(dtype).smallest_normal)


def _is_power(dtype: torch.dtype) -> bool:
    return dtype == torch.uint8 or "e8m0" in str(dtype)


def _stored_scale(steps: Tensor, dtype: torch.dtype) -> Tensor:
    return (torch.log2(steps).round() + 127).to(dtype) if dtype == torch.uint8 else steps.to(dtype)


def _nearest(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest codes; a cast to FP8 would make NaN of what lies beyond its largest number."""
    if dtype == torch.int8:
        return values.round().clamp(-128, 127).to(dtype)
    top = torch.finfo(dtype).max
    return values.clamp(-top, top).to(dtype)


def rows_of_int8(codes: str, scale: str, rows: int, columns: int) -> Encoder:
    """int8 of bitsandbytes: a row's largest weight is its scale, and 127 its code."""

    def run(part: Part, stored: Mapping[str, Tensor]) -> None:
        for first, last in _pieces(0, rows, columns):
            values = part(first * columns, last * columns).view(-1, columns)
            largest = values.abs().amax(1).to(stored[scale].dtype)
            stored[scale][first:last] = largest
            steps = torch.where(largest > 0, largest.float(), 1.0)[:, None] / 127
            stored[codes][first:last] = _nearest(values / steps, torch.int8)

    return Encoder([codes, scale], run)


def mxfp4(codes: str, scale: str, experts: int, out: int, groups: int, half: int) -> Encoder:
    """MXFP4 as gpt-oss stores it, of a tensor (expert, in, out): two codes a byte, a power of 2 for each group."""
    each = 2 * half

    def run(part: Part, stored: Mapping[str, Tensor]) -> None:
        step = max(1, _SLICE // (each * out))
        for expert in range(experts):
            for first in range(0, groups, step):
                last = min(first + step, groups)
                begin = (expert * groups + first) * each * out
                values = part(begin, begin + (last - first) * each * out).view(-1, out).T
                pairs, powers = _fp4_codes(values.reshape(out, last - first, each))
                stored[codes][expert, :, first:last] = pairs[..., ::2] | pairs[..., 1::2] << 4
                stored[scale][expert, :, first:last] = powers

    return Encoder([codes, scale], run)


def _fp4_codes(values: Float[Tensor, "out group entry"]) -> tuple[UInt8[Tensor, "out group entry"], Tensor]:
    """Codes and scales of groups, each scale the better of the two powers of 2 next to the largest weight over 6."""
    largest = values.abs().amax(-1)
    power = torch.where(largest > 0, torch.log2(largest.clamp(min=2.0**-120)).floor() - 2, 0.0)
    best = None
    for each in (power, power + 1):
        each = each.clamp(-127, 127)
        scaled = values * torch.exp2(-each)[..., None]
        sizes = torch.bucketize(scaled.abs().contiguous(), _FP4_STEPS)
        error = (torch.tensor(FP4)[sizes] - scaled.abs()).mul_(torch.exp2(each)[..., None]).square().sum(-1)
        found = (error, sizes.to(torch.uint8) | (scaled < 0).to(torch.uint8) << 3, each)
        best = found if best is None else _better(best, found)
    assert best is not None
    return best[1], (best[2] + 127).to(torch.uint8)


def _better(one: tuple[Tensor, Tensor, Tensor], other: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Of each group the one with the smaller error."""
    wins = other[0] < one[0]
    codes = torch.where(wins[..., None], other[1], one[1])
    return torch.minimum(one[0], other[0]), codes, torch.where(wins, other[2], one[2])


def table_codes(codes: str, scale: str, table: Callable[[], Tensor], numel: int, size: int) -> Encoder:
    """nf4 and fp4 of bitsandbytes: the nearest of 16 numbers times the largest of every `size` weights."""

    def run(part: Part, stored: Mapping[str, Tensor]) -> None:
        numbers, order = table().float().view(-1).sort()
        middles = (numbers[1:] + numbers[:-1]) / 2
        step = 2 * size * max(1, _SLICE // (2 * size))
        for start in range(0, numel, step):
            stop = min(start + step, numel)
            values = torch.nn.functional.pad(part(start, stop), (0, -(stop - start) % size)).view(-1, size)
            largest = values.abs().amax(1).to(stored[scale].dtype)
            stored[scale].view(-1)[start // size : -(-stop // size)] = largest
            steps = torch.where(largest > 0, largest.float(), 1.0)[:, None]
            found = (
                order[torch.bucketize((values / steps).contiguous(), middles)].to(torch.uint8).view(-1)[: stop - start]
            )
            found = torch.nn.functional.pad(found, (0, len(found) % 2))
            stored[codes].view(-1)[start // 2 : -(-stop // 2)] = found[::2] << 4 | found[1::2]

    return Encoder([codes, scale], run)
