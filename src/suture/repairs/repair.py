"""The one entry to all kinds of repair: `repair(module, experts, inputs, kind)`."""

import os
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from suture.core.batches import Forward, Inputs, call
from suture.core.knobs import Knobs
from suture.core.progress import Track, untracked
from suture.errors import ConfigError, unknown_name
from suture.repairs.blend import blend
from suture.repairs.deep import deep
from suture.repairs.final import final
from suture.repairs.problem import Experts, OnStep, Problem
from suture.repairs.results import SurgeryResult
from suture.storage.resume import Resume

#: The kinds of repair. The keyword-only arguments of each are its knobs, and the schema of its configuration.
SURGERIES: dict[str, Callable[..., SurgeryResult]] = {"final": final, "deep": deep, "blend": blend}


def repair(
    module: nn.Module,
    experts: Experts,
    inputs: Mapping[str, Inputs],
    kind: str = "final",
    *,
    forward: Forward = call,
    cache: str | os.PathLike[str] | None = None,
    encode_batch: int = 64,
    resume: Resume | None = None,
    on_step: OnStep | None = None,
    track: Track = untracked,
    **knobs: Any,
) -> SurgeryResult:
    """Fit a repair of a merged module to its experts' features, on unlabelled inputs.

    `module` and the experts give features (batch, dim) through `forward(module, inputs)`; they are run in evaluation
    mode and never changed. `inputs[task]` is (N, …), or a mapping of such tensors for keyword arguments. `experts` is a
    mapping task → module, or a function that gives the task's module and may load all of them into one (not into
    `module`). `kind`: see `SURGERIES`, whose functions have the `knobs`. In the folder `cache` encodings are kept, by
    the content of weights and inputs. With `resume` a loop that was killed goes on, to the same bits.
    `on_step(step, losses, modules)` sees the live modules by place after every step.

    Raises `ConfigError` for an unknown kind, knob or value, `DataError` for a task without inputs or a loss that is not
    finite.

    >>> import torch
    >>> merged, expert = nn.Linear(3, 4), nn.Linear(3, 4)
    >>> result = repair(merged, {"mnist": expert}, {"mnist": torch.randn(20, 3)}, "final", rank=2, steps=50, lr=0.01)
    >>> bool(result.losses[-1] < result.losses[0])
    True
    >>> result.model(torch.randn(5, 3), "mnist").shape
    torch.Size([5, 4])
    """
    problem = Problem(module, experts, inputs, forward, cache, encode_batch, resume, on_step, track)
    return get_surgery(kind)(problem, **knobs_of(kind).validate(knobs))


def get_surgery(kind: str) -> Callable[..., SurgeryResult]:
    """The repair of this name; raises `ConfigError` with the nearest names."""
    if kind not in SURGERIES:
        raise ConfigError(unknown_name("surgery", kind, SURGERIES))
    return SURGERIES[kind]


def knobs_of(kind: str) -> Knobs:
    """The knobs of a kind, read from its function."""
    return Knobs(f"surgery={kind}", get_surgery(kind), group="surgery")
