"""What every kind of repair gives back."""

from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from suture.repairs.blended_model import BlendModel
from suture.repairs.model import SurgeryModel
from suture.repairs.modules import SurgeryModules, active_shares, dead_warnings
from suture.repairs.network import Block
from suture.repairs.problem import ForwardPasses, Problem


@dataclass(frozen=True)
class SurgeryResult:
    """A repaired model and how it came about.

    - `model`: inputs, task → repaired features.
    - `losses`: (step, task) the loss of each task before each step.
    - `active`: per task, the share of its modules' units that were active on its inputs; empty for blends.
    - `warnings`: one line each for a user to read.
    - `added_parameters`: how many numbers the repair adds to the model, for all tasks.
    - `passes`: how many inputs went through the merged module and through experts; cached ones are not counted.
    - `encoders`: how many encoders run at inference.
    """

    model: SurgeryModel | BlendModel
    losses: Float[Tensor, "step task"]
    active: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    added_parameters: int = 0
    passes: ForwardPasses = field(default_factory=ForwardPasses)
    encoders: int = 1


def surgery_result(
    problem: Problem, repairs: dict[str, SurgeryModules], losses: Tensor, blocks: tuple[Block, ...] = ()
) -> SurgeryResult:
    """The result of a repair with surgery modules that have noted which of their units were active."""
    active, warnings = active_shares(repairs, problem.tasks), dead_warnings(repairs, problem.tasks)
    for modules in repairs.values():
        modules.fired = None
    model = SurgeryModel(problem.module, repairs, problem.tasks, forward=problem.forward, blocks=blocks)
    return SurgeryResult(model, losses, active, warnings, model.added_parameters, problem.passes)
