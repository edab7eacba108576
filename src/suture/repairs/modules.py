"""The surgery module ẑ = z − U·ReLU(D·z), one per task and layer. https://arxiv.org/abs/2402.02705"""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from suture.core.random import generator_for
from suture.errors import IncompatibleModels
from suture.repairs.network import FINAL

Variant = Literal["standard", "centred", "normalised"]
_NEARLY_DEAD = 0.1
_NON_NEGATIVE = 0.99


class SurgeryModules(nn.Module):
    """The modules of all tasks at one layer: `down` (task, rank, dim) is D, `up` (task, dim, rank) is U, no bias.

    D is drawn uniformly from ±1/√dim, seeded by (seed, task, layer); U is zero, so the start is the identity. Variants:

    - `standard`: the paper's.
    - `centred`: D is applied to z minus the task's mean feature, the buffer `mean`. Over the inputs of that mean, each
      unit's input then sums to zero whatever D is, so every unit is active for some of them.
    - `normalised`: z is L2-normalised first, and ẑ is not normalised again, as in FusionBench.

    `fired` (task, rank) marks the units that have been active since the last `clear`; None while it is not recorded.

    >>> modules = SurgeryModules(["mnist"], dim=4, rank=2)
    >>> features = torch.randn(3, 1, 4)
    >>> torch.equal(modules(features, slice(0, 1)), features)
    True
    """

    mean: Tensor | None

    def __init__(
        self,
        tasks: Sequence[str],
        dim: int,
        rank: int,
        *,
        layer: str = FINAL,
        variant: Variant = "standard",
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.variant: Variant = variant
        self.down = nn.Parameter(torch.stack([_drawn(rank, dim, seed, task, layer) for task in tasks]).to(dtype))
        self.up = nn.Parameter(torch.zeros(len(tasks), dim, rank, dtype=dtype))
        self.register_buffer("mean", torch.zeros(len(tasks), 1, dim, dtype=dtype) if variant == "centred" else None)
        self.fired: Bool[Tensor, "task rank"] | None = None

    @property
    def rank(self) -> int:
        """The number of units of a module."""
        return self.down.shape[1]

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that a fit trains."""
        return [self.down, self.up]

    def forward(self, features: Float[Tensor, "row position dim"], which: slice | Tensor) -> Tensor:
        """ẑ, of the same shape and dtype.

        `which`: a slice of tasks, each with an equal share of the rows, in order; or a task index per row.
        """
        if features.shape[-1] != self.down.shape[-1]:
            raise IncompatibleModels(
                f"The backbone gives features of width {features.shape[-1]}, a surgery module takes "
                f"{self.down.shape[-1]}. Remedy: put it beside the backbone that it was fitted to."
            )
        z = self.prepared(features.to(self.down.dtype))
        return (z - self._correction(z, which)).to(features.dtype)

    def prepared(self, features: Tensor) -> Tensor:
        """The features for a comparison with the expert's: L2-normalised in the variant `normalised`."""
        return normalize(features, dim=-1) if self.variant == "normalised" else features

    def only(self, task: int) -> "SurgeryModules":
        """A copy with one task's module only."""
        one = SurgeryModules([""], self.down.shape[2], self.rank, variant=self.variant, dtype=self.down.dtype)
        state = {name: tensor[task : task + 1].clone() for name, tensor in self.state_dict().items()}
        one.to(self.down.device).load_state_dict(state)
        return one.requires_grad_(False)

    def copied(self) -> "SurgeryModules":
        """A copy of all tasks' modules."""
        return copy.deepcopy(self)

    @torch.no_grad()
    def take(self, other: "SurgeryModules", task: int) -> None:
        """Copy one task's module from another stack."""
        for target, source in zip(self.state_dict().values(), other.state_dict().values(), strict=True):
            target[task] = source[task]

    def clear(self) -> None:
        """Start recording which units are active; a record that is there is emptied in its memory."""
        if self.fired is None:
            self.fired = torch.zeros(self.down.shape[:2], dtype=torch.bool, device=self.down.device)
        else:
            self.fired.zero_()

    def _correction(self, z: Tensor, which: slice | Tensor) -> Tensor:
        down, up = self._of(which, self.down), self._of(which, self.up)
        grouped = z.reshape(len(down), -1, z.shape[-1])
        if self.mean is not None:
            grouped = grouped - self._of(which, self.mean)
        hidden = (grouped @ down.mT).relu()
        if self.fired is not None:
            self.fired[which] |= (hidden.detach() > 0).any(1)
        return (hidden @ up.mT).view_as(z)

    @staticmethod
    def _of(which: slice | Tensor, stack: Tensor) -> Tensor:
        """A part of a stack; all of it as it is, since the gradient of a part is written into zeros."""
        whole = isinstance(which, slice) and which.indices(len(stack)) == (0, len(stack), 1)
        return stack if whole else stack[which]


def auto_variants(layers: Mapping[str, Sequence[Tensor]]) -> tuple[dict[str, Variant], tuple[str, ...]]:
    """Layer → variant for `variant=auto`, from the features of every task at every layer, and a line that says so.

    It is `centred` where at least 99% of the features are not negative, as after a ReLU: there D·z hardly changes sign,
    so that a unit of the standard variant may never be active. Elsewhere it is `standard`.
    """
    shares: dict[str, float] = {}
    for layer, tasks in layers.items():
        shares[layer] = sum(int((rows >= 0).sum()) for rows in tasks) / max(1, sum(rows.numel() for rows in tasks))
    centred = [layer for layer, share in shares.items() if share >= _NON_NEGATIVE]
    variants: dict[str, Variant] = {layer: "centred" if layer in centred else "standard" for layer in layers}
    if not centred:
        return variants, ()
    where = "" if len(centred) == len(layers) else f" at {', '.join(centred[:3])}{' …' if len(centred) > 3 else ''}"
    share = min(shares[layer] for layer in centred)
    return variants, (f"variant=centred{where}, because {100 * share:.4g}% of the features are ≥ 0.",)


def active_shares(layers: Mapping[str, SurgeryModules], tasks: Sequence[str]) -> dict[str, float]:
    """Per task, the share of its units, over all layers, that have been active."""
    fired = torch.cat([modules.fired.cpu() for modules in layers.values() if modules.fired is not None], dim=1)
    return dict(zip(tasks, fired.double().mean(1).tolist(), strict=True))


def dead_warnings(layers: Mapping[str, SurgeryModules], tasks: Sequence[str]) -> tuple[str, ...]:
    """One line for each task whose units are nearly all inactive, or all inactive at some layer."""
    warnings = []
    for i, (task, share) in enumerate(active_shares(layers, tasks).items()):
        dead = [layer for layer, m in layers.items() if m.fired is not None and not m.fired[i].any()]
        if share <= _NEARLY_DEAD or dead:
            remedy = "repair=affine" if all(m.variant == "centred" for m in layers.values()) else "variant=centred"
            where = f", none at {', '.join(dead[:3])}{' …' if len(dead) > 3 else ''}" if dead else ""
            warnings.append(
                f"Task {task!r}: only {share:.0%} of the repair's units are ever active on its inputs{where}; "
                f"an inactive module corrects nothing. Remedy: {remedy}."
            )
    return tuple(warnings)


def _drawn(rank: int, dim: int, seed: int, task: str, layer: str) -> Float[Tensor, "rank dim"]:
    """Uniform in ±1/√dim, which is Kaiming's uniform with a = √5."""
    bound, generator = 1 / math.sqrt(dim), generator_for(seed, f"surgery/{task}/{layer}")
    return torch.empty(rank, dim, dtype=torch.float64).uniform_(-bound, bound, generator=generator)
