"""Many tensors in one buffer each of base, task vectors and merged weights, so that a step takes a few operations.

On an accelerator the launches of small operations take longer than their arithmetic. Every tensor begins at a block of
its own, and a block belongs to one tensor. So the merge is one product a block, with the coefficients of its tensor,
and so are the inner products with the gradient, which are then added up over each tensor's blocks.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from suture.adaptation.vectors import Held
from suture.core.autocasting import autocast_dtype, autocast_parameters

BLOCK = 1 << 10  # entries; the last block of a tensor is filled up with zeros
_WIDENED = 1 << 12  # blocks of task vectors of a narrower dtype that are widened at once


@dataclass
class Member:
    """One tensor of a buffer: its place among the merged tensors, and its blocks."""

    index: int
    target: Tensor
    first: int
    blocks: int

    def __post_init__(self):
        last = torch.channels_last  # the kernels of convolutions may be so
        self._channels_last = self.target.ndim == 4 and self.target.is_contiguous(memory_format=last)
        plain = torch.empty(self.target.shape, device="meta")
        self._strides = (plain.to(memory_format=last) if self._channels_last else plain).stride()

    def view(self, buffer: Tensor) -> Tensor:
        """The tensor's part of a buffer (block, entry) of one value for each entry, in the tensor's order in memory."""
        entries = buffer[self.first : self.first + self.blocks].view(-1)[: self.target.numel()]
        return entries.as_strided(self.target.shape, self._strides)

    def rows(self, buffer: Float[Tensor, "block task width"]) -> Float[Tensor, "task entry"]:
        """The task vectors of the tensor, copied."""
        entries = buffer[self.first : self.first + self.blocks].transpose(0, 1).flatten(1)
        tasks = entries.as_strided((len(entries), *self.target.shape), (entries.stride(0), *self._strides))
        return tasks.flatten(1)

    def in_order(self, rows: Float[Tensor, "task entry"]) -> Float[Tensor, "task entry"]:
        """Task vectors in the tensor's order in memory."""
        if not self._channels_last:
            return rows
        return rows.view(-1, *self.target.shape).permute(0, 1, 3, 4, 2).flatten(1)


class FlatTensors:
    """Merged tensors of one dtype in one buffer, of which the module's tensors become views.

    `half` is the dtype in which the network computes, for parameters that autocast would convert in every forward pass;
    they are then merged in the base's dtype and written in this one.
    """

    def __init__(
        self, targets: Mapping[int, Tensor], bases: Sequence[Tensor], rows: Sequence[Held], half: torch.dtype | None
    ):
        first, self.members = 0, list[Member]()
        for index, target in targets.items():
            blocks = max(1, -(-target.numel() // BLOCK))
            self.members.append(Member(index, target, first, blocks))
            first += blocks
        example, task_vectors = bases[self.members[0].index], rows[self.members[0].index].values
        device, self.half = self.members[0].target.device, half
        self.base = torch.zeros(first, BLOCK, dtype=example.dtype, device=device)
        self.rows = torch.zeros(first, len(task_vectors), BLOCK, dtype=task_vectors.dtype, device=device)
        self.merged = torch.zeros(first, BLOCK, dtype=half or example.dtype, device=device)
        counts = torch.tensor([member.blocks for member in self.members])
        self.lengths = counts.to(device)
        places = torch.tensor([member.index for member in self.members])
        self.owner = torch.repeat_interleave(places, counts).to(device)
        for member in self.members:
            self._fill(member, bases[member.index], rows[member.index])
        self._attach(self.merged)

    def _fill(self, member: Member, base: Tensor, held: Held) -> None:
        member.view(self.base).copy_(base)
        padded = self.rows.new_zeros(len(held), member.blocks * BLOCK)
        padded[:, : member.target.numel()] = member.in_order(held.values).to(padded)
        self.rows[member.first : member.first + member.blocks] = padded.view(len(held), -1, BLOCK).transpose(0, 1)

    def _attach(self, buffer: Tensor) -> None:
        for member in self.members:
            member.target.data = member.view(buffer)

    @torch.no_grad()
    def write(self, coefficients: Float[Tensor, "task tensor"]) -> None:
        """Write θ₀ + Σ λ_t τ_t into the tensors; the coefficients of all merged tensors, on the device."""
        self._merge(coefficients, self.merged)

    def _merge(self, coefficients: Tensor, out: Tensor) -> None:
        factors = coefficients.to(self.base.dtype).T[self.owner][:, None]  # (block, 1, task)
        with exact_products(self.base.device):
            for blocks in self._parts():
                rows = self.rows[blocks].to(self.base.dtype)
                merged = torch.baddbmm(self.base[blocks][:, None], factors[blocks], rows)
                out[blocks] = merged[:, 0]

    @torch.no_grad()
    def products(self) -> Float[Tensor, "task tensor"]:
        """⟨G, τ_t⟩ of the gradients of the tensors, which are forgotten; float64 where the device has it."""
        with_gradient = [member for member in self.members if member.target.grad is not None]
        gradients = [_dense(member.target.grad) for member in with_gradient]
        flat = torch.zeros_like(self.base)
        if gradients:
            parts = [member.view(flat) for member in with_gradient]
            torch._foreach_copy_(parts, gradients)  # pyright: ignore[reportPrivateImportUsage]
        for member in self.members:
            member.target.grad = None
        with exact_products(self.base.device):
            parts = [torch.bmm(self.rows[b].to(flat.dtype), flat[b][:, :, None])[:, :, 0] for b in self._parts()]
        blocks = torch.cat(parts).to(widest(flat.device))
        return torch.segment_reduce(blocks, "sum", lengths=self.lengths, unsafe=True).T  # the check would read them

    def _parts(self) -> list[slice]:
        """All blocks at once, or some at a time where task vectors have to be widened."""
        count = len(self.rows)
        step = count if self.rows.dtype == self.base.dtype else _WIDENED
        return [slice(start, start + step) for start in range(0, count, max(1, step))]

    @contextmanager
    def in_full(self, coefficients: Float[Tensor, "task tensor"]) -> Iterator[None]:
        """Inside the block the tensors are in the base's dtype, whatever the network computes in."""
        if self.half is None:
            yield self.write(coefficients)
            return
        whole = torch.empty_like(self.base)
        with torch.no_grad():
            self._merge(coefficients, whole)
        self._attach(whole)
        try:
            yield
        finally:
            self._attach(self.merged)


def in_buffers(device: torch.device) -> bool:
    """Whether a device gains from buffers; on a CPU they would cost the memory of a model and gain nothing."""
    return device.type != "cpu"


def flat_groups(
    module: nn.Module, targets: Sequence[Tensor], bases: Sequence[Tensor], rows: Sequence[object]
) -> list[FlatTensors]:
    """Buffers for all tensors whose task vectors are held in memory; the others stay as they are."""
    half = autocast_dtype(targets[0].device) if targets else None
    cast = autocast_parameters(module) if half else set()
    groups: dict[tuple[torch.dtype, ...], dict[int, Tensor]] = {}
    for i, (target, base, held) in enumerate(zip(targets, bases, rows, strict=True)):
        if isinstance(held, Held) and target.dtype == base.dtype:
            converted = half if half and id(target) in cast and target.dtype == torch.float32 else target.dtype
            groups.setdefault((base.dtype, held.values.dtype, converted), {})[i] = target
    held_rows = [each if isinstance(each, Held) else Held(torch.empty(0, 0)) for each in rows]
    return [
        FlatTensors(members, bases, held_rows, key[2] if key[2] != key[0] else None) for key, members in groups.items()
    ]


def widest(device: torch.device) -> torch.dtype:
    """The dtype for sums over a model: float64, or float32 on a device without it."""
    return torch.float32 if device.type == "mps" else torch.float64


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Inside the block, products of float32 matrices are of float32: without autocast, and without TF32 on a GPU."""
    rounded = torch.backends.cuda.matmul.allow_tf32
    with torch.autocast(device.type, enabled=False):
        try:
            if rounded:
                torch.backends.cuda.matmul.allow_tf32 = False
            yield
        finally:
            if rounded:
                torch.backends.cuda.matmul.allow_tf32 = True


def _dense(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient.to_dense() if gradient.is_sparse else gradient
