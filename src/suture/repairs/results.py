"""The result of every kind of repair."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from suture.core.batches import device_of
from suture.core.notebooks import frame
from suture.repairs.blended_model import BlendModel
from suture.repairs.comparison import Representation
from suture.repairs.masked_model import MaskedModel
from suture.repairs.model import SurgeryModel
from suture.repairs.modules import SurgeryModules, active_shares, dead_warnings
from suture.repairs.network import Block
from suture.repairs.problem import ForwardPasses, Problem
from suture.repairs.static_model import StaticModel

if TYPE_CHECKING:
    from pandas import DataFrame

RepairedModel = SurgeryModel | BlendModel | StaticModel | MaskedModel


class Stream(NamedTuple):
    """One pass over single inputs.

    - `order`: per task, the positions of its inputs in the order of their arrival.
    - `outputs`: per task, (input, dim) the repaired feature of each input in that order, before the step on it.
    """

    order: Mapping[str, Int[Tensor, " input"]]
    outputs: Mapping[str, Float[Tensor, "input dim"]]


@dataclass(frozen=True)
class RepairResult:
    """A repaired model, and the record of its fit.

    - `model`: inputs, task → repaired features; `model.for_task(task)` is a plain module.
    - `losses`: (step, task) the loss of each task before each step; nan where a task had no step.
    - `active`: per task, the share of its modules' units that were active on its inputs; empty for blends.
    - `warnings`: warnings and decisions for the user, one line each.
    - `added_parameters`: the number of parameters that the repair adds, for all tasks.
    - `passes`: the number of inputs through the merged module and through experts, without cached ones.
    - `encoders`: the number of encoders that run at inference.
    - `stages`: share of the stream → the repaired model after it, and `stream`, for online repairs.

    A run adds the `name` of the repair's row, the `chain` of kinds that it is the last of, the `split` that it was
    fitted on and the number of `inputs` of all tasks, the `seconds` that merge and repair took, the process's peak of
    `memory` in bytes meanwhile, `scores` (step → mean accuracy while fitting), the `representation` compared with the
    experts', and the folder of the cached `encodings`.
    """

    kind: str
    model: RepairedModel
    losses: Float[Tensor, "step task"]
    active: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    added_parameters: int = 0
    passes: ForwardPasses = field(default_factory=ForwardPasses)
    encoders: int = 1
    stages: Mapping[float, SurgeryModel] = field(default_factory=dict)
    stream: Stream | None = None
    name: str = ""
    chain: tuple[str, ...] = ()
    inputs: int = 0
    seconds: float = 0.0
    memory: int | None = None
    split: Literal["train", "test"] | None = None
    scores: Mapping[int, float] = field(default_factory=dict)
    representation: Representation | None = None
    encodings: Path | None = None

    def __repr__(self) -> str:
        return f"RepairResult({self.kind!r} of {', '.join(self.tasks)}, {len(self.losses)} steps)"

    def to_pandas(self) -> "DataFrame":
        """The losses: one row for each step, one column for each task."""
        lines = [(step, *row) for step, row in enumerate(self.losses.tolist())]
        return frame(("step", *self.tasks), lines, index="step")

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, in the order of the columns of `losses`."""
        return tuple(self.model.tasks)

    @property
    def learned(self) -> str:
        """A few words on what was learned and from which inputs; empty for masks, which only take weights."""
        if isinstance(self.model, MaskedModel):
            return ""
        what = "modules" if self.tensors is None else "weights"
        how = f"{len(self.losses):,} steps" if len(self.losses) else "solved"
        return f"{what}, {how}{self._of_inputs}"

    @property
    def learned_for_routing(self) -> str:
        """As `learned`, for use with the router."""
        return self.learned or f"router{self._of_inputs}"

    @property
    def _of_inputs(self) -> str:
        each = self.inputs / max(1, len(self.tasks))
        return f" on {each:,.0f} {self.split} inputs a task" if self.inputs else ""

    @property
    def tensors(self) -> Mapping[str, Tensor] | None:
        """The repaired weights under the module's own names; None if the repair is beside the weights."""
        return self.model.tensors if isinstance(self.model, StaticModel) else None


def surgery_result(
    kind: str,
    problem: Problem,
    repairs: dict[str, SurgeryModules],
    losses: Tensor,
    blocks: tuple[Block, ...] = (),
    *,
    notes: tuple[str, ...] = (),
) -> RepairResult:
    """The result of a repair with surgery modules that have recorded their active units; `notes` are for the user."""
    active, warnings = active_shares(repairs, problem.tasks), (*notes, *dead_warnings(repairs, problem.tasks))
    for modules in repairs.values():
        modules.fired = None
    home = device_of(problem.module)
    repairs = {layer: modules.to(home) for layer, modules in repairs.items()}
    model = SurgeryModel(problem.module, repairs, problem.tasks, forward=problem.forward, blocks=blocks)
    return RepairResult(kind, model, losses, active, warnings, model.added_parameters, problem.passes)
