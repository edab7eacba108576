"""The arithmetic of peft's kinds of adapter: rows of a tuned tensor, from the base's rows and the adapter's tensors.

A tensor is laid out as a matrix (rows, columns), as it is stored: its last axes for experts, else all axes but the
first are columns. An update changes some rows at a time, so nothing of the base's size is held.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from suture.checkpoints.checkpoint import Factors

Rows = Float[Tensor, "rows columns"]
#: (the base's rows, the first of them) → the same rows of the tuned tensor.
RowUpdate = Callable[[Tensor, int], Tensor]


class Update(NamedTuple):
    """The update of one tensor by an adapter; `factors` where it adds a product of low rank and nothing else."""

    rows: RowUpdate
    factors: Callable[[], Factors] | None = None


def low_rank(factors: Callable[[], Factors]) -> Update:
    """LoRA (https://arxiv.org/abs/2106.09685), and what comes to the same: base + up · down."""

    def rows(base: Rows, first: int) -> Rows:
        up, down = factors()
        return base + up[first : first + len(base)] @ down

    return Update(rows, factors)


def rescaled(update: Update, magnitudes: Float[Tensor, " out"], norms: Callable[[], Tensor] | None) -> Update:
    """DoRA (https://arxiv.org/abs/2402.09353): every output's vector of base + up · down gets a trained length.

    Outputs are rows; where `norms` gives the lengths of columns, they are columns.
    """

    def rows(base: Rows, first: int) -> Rows:
        tuned = update.rows(base, first)
        lengths = magnitudes.to(tuned.dtype)
        if norms is not None:
            return tuned * (lengths / norms().to(tuned.dtype))
        return tuned * (lengths[first : first + len(base)] / torch.linalg.vector_norm(tuned, dim=1))[:, None]

    return Update(rows)


def column_norms(update: Update, base: Callable[[int, int], Rows], count: int, block: int) -> Float[Tensor, " columns"]:
    """The length of every column of a tuned tensor of `count` rows, from blocks of them; `base(first, last)` reads."""
    squares = sum(
        update.rows(base(first, min(first + block, count)), first).double().square().sum(0)
        for first in range(0, count, block)
    )
    return torch.as_tensor(squares).sqrt()


def stacked(ups: Float[Tensor, "expert rows rank"], downs: Float[Tensor, "expert rank columns"]) -> Update:
    """LoRA on fused experts (`target_parameters`): each expert has factors of its own."""
    height = ups.shape[1]

    def rows(base: Rows, first: int) -> Rows:
        last = first + len(base)
        parts = []
        for expert in range(first // height, -(-last // height)):
            start, stop = max(first - expert * height, 0), min(last - expert * height, height)
            parts.append(ups[expert, start:stop] @ downs[expert])
        return base + torch.cat(parts) if parts else base

    return Update(rows)


def scaled(vector: Float[Tensor, " n"], by_row: bool) -> Update:
    """IA³ (https://arxiv.org/abs/2205.05638): every row or column is multiplied by a number."""

    def rows(base: Rows, first: int) -> Rows:
        factors = vector.to(base.dtype)
        if not by_row:  # a channel of a kernel has several columns
            return base * factors.repeat_interleave(base.shape[1] // len(factors))
        return base * factors[first : first + len(base), None]

    return Update(rows)


def added(vector: Float[Tensor, " n"]) -> Update:
    """A vector added to a tensor of one column."""
    return Update(lambda base, first: base + vector[first : first + len(base), None].to(base.dtype))


def replaced_rows(numbers: Sequence[int], trained: Float[Tensor, "row columns"]) -> Update:
    """Trained tokens: some rows of an embedding take trained values."""
    order = {row: i for i, row in enumerate(numbers)}

    def rows(base: Rows, first: int) -> Rows:
        here = [(row - first, i) for row, i in order.items() if first <= row < first + len(base)]
        tuned = base.clone()
        for target, source in here:
            tuned[target] = trained[source].to(base.dtype)
        return tuned

    return Update(rows)


def hadamard(parts: Mapping[str, Tensor], scale: float) -> Update:
    """LoHa (https://arxiv.org/abs/2108.06098): base + scale · (product of low rank) ∘ (another one)."""

    def rows(base: Rows, first: int) -> Rows:
        last = first + len(base)
        product = [_loha_rows(parts, number, first, last) for number in "12"]
        return base + scale * (product[0] * product[1]).to(base.dtype)

    return Update(rows)


def _loha_rows(parts: Mapping[str, Tensor], number: str, first: int, last: int) -> Rows:
    left, right = parts[f"hada_w{number}_a"], parts[f"hada_w{number}_b"]
    core = parts.get(f"hada_t{number}")
    if core is None:
        return left[first:last] @ right
    return torch.einsum("ijkl,jr,ip->prkl", core, right, left[:, first:last]).flatten(1)


def kronecker(parts: Mapping[str, Tensor], scale: float) -> Update:
    """LoKr (https://arxiv.org/abs/2309.14859): base + scale · (a small matrix ⊗ another, either of low rank or not)."""
    left, right = _lokr_part(parts, "1"), _lokr_part(parts, "2")

    def rows(base: Rows, first: int) -> Rows:
        numbers = torch.arange(first, first + len(base))
        outer, inner = left[numbers // len(right)], right[numbers % len(right)]
        kernel = inner.flatten(2) if inner.dim() > 2 else inner[:, :, None]
        product = torch.einsum("na,nbk->nabk", outer, kernel).flatten(1)
        return base + scale * product.to(base.dtype)

    return Update(rows)


def _lokr_part(parts: Mapping[str, Tensor], number: str) -> Tensor:
    whole = parts.get(f"lokr_w{number}")
    if whole is not None:
        return whole
    left, right = parts[f"lokr_w{number}_a"], parts[f"lokr_w{number}_b"]
    core = parts.get(f"lokr_t{number}")
    return left @ right if core is None else torch.einsum("ijkl,ip,jr->prkl", core, left, right)


def vera_projections(rank: int, rows: int, columns: int, key: int) -> tuple[Rows, Rows]:
    """The frozen random factors B and A that VeRA (https://arxiv.org/abs/2310.11454) draws from its key, as peft does.

    `rows` and `columns` are the largest of all adapted weights.
    """
    generator = torch.Generator().manual_seed(key)
    down = _uniform((rank, columns), generator)
    return _uniform((rows, rank), generator), down


def _uniform(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def start_taken(weight: Float[Tensor, "out inner"], start: str, rank: int) -> Factors:
    """The part of a base's weight that an initialisation took away before the training, as peft computes it.

    PiSSA (https://arxiv.org/abs/2404.02948) takes the largest singular components, OLoRA
    (https://arxiv.org/abs/2406.01775) the first columns of a QR decomposition; for OLoRA it is yet to be scaled.
    """
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if start == "olora":
        q, r = torch.linalg.qr(weight)
        return Factors(q[:, :rank].contiguous(), r[:rank].contiguous())
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    return Factors(left[:, :rank] * values[:rank], right[:rank].contiguous())
