"""The entry point to all kinds of repair: `repair(module, experts, inputs, kind)`."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from suture.core.batch_sizes import BatchSize
from suture.core.batches import Forward, call, device_of
from suture.core.progress import Track, untracked
from suture.errors import ConfigError, unknown_name
from suture.repairs.problem import Experts, OnStep, Problem
from suture.repairs.registry import get_repair_kind
from suture.repairs.results import RepairResult
from suture.repairs.router import ROUTERS, fit_router
from suture.storage.resume import Resume
from suture.tasks.given import Given, inputs_of

if TYPE_CHECKING:
    from suture.core.fabric import Fabric


def repair(
    module: nn.Module,
    experts: Experts,
    inputs: Mapping[str, Given],
    kind: str = "final",
    *,
    router: bool | str = False,
    forward: Forward = call,
    cache: str | os.PathLike[str] | None = None,
    encode_batch: BatchSize = 64,
    resume: Resume | None = None,
    on_step: OnStep | None = None,
    look_every: int = 1,
    track: Track = untracked,
    base: Mapping[str, Tensor] | None = None,
    fabric: "Fabric | None" = None,
    **knobs: Any,
) -> RepairResult:
    """Fit a repair of a merged module to its experts' features, on unlabelled inputs.

    `forward(module, inputs)` returns features (batch, dim); `module` and the experts run in evaluation mode and are
    never changed. `inputs[task]` is (N, …), a mapping of such tensors for keyword arguments, a loader of batches, or a
    file of tensors; labels are left out. `experts` is a mapping task → module, or a function that returns a task's
    module and may load all of them into one (but not into `module`).
    Inputs are encoded `encode_batch` at a time, or with "auto" as many as fit in the memory of a GPU.
    `kind` is a name from `repair_kinds()`, and `knobs` are that kind's. Encodings are cached in the folder `cache`,
    keyed by the content of weights and inputs. With a `router` ("linear", which True means, or "centroids"), fitted on
    the same inputs, the model needs no task's name. With `resume` an interrupted loop continues with bit-identical
    results. `base` is the pretrained model's state under the module's names, for the kinds that change weights: tensors
    that it lacks stay as they are.
    `on_step(step, losses, modules)` gets the live modules of every layer after each step; on an accelerator, surgery
    may tell `look_every` steps at once, with the modules after the last of them, and then waits for it less often.
    The processes of a `fabric`, all of which make this call, share encodings, the inputs of a step (deep, distil) or
    tasks (calibrate), and have the same result; each has module and experts on its own device. Files are written,
    `on_step` is called and progress is told by process 0 alone. With the strategy fsdp of `make_fabric` the weights of
    the network that runs are split over the processes, and calibration holds a block at a time; `module` and experts
    may lie in mapped files, as after `load_state_dict(dict(open_checkpoint(path)), assign=True)`, and so do calibrated
    weights.

    Raises `ConfigError` for an unknown kind, knob or value, for a router where the result is one model for all tasks,
    and for fsdp with a kind that needs whole weights, and `DataError` for a task without inputs or a loss that is not
    finite.

    >>> import torch
    >>> merged, expert = nn.Linear(3, 4), nn.Linear(3, 4)
    >>> result = repair(merged, {"mnist": expert}, {"mnist": torch.randn(20, 3)}, "final", rank=2, steps=50, lr=0.01)
    >>> bool(result.losses[-1] < result.losses[0])
    True
    >>> result.model(torch.randn(5, 3), "mnist").shape
    torch.Size([5, 4])
    """
    chosen = get_repair_kind(kind)
    values = chosen.knobs.validate(knobs)
    if router and chosen.static:
        raise ConfigError(f"repair={kind} leaves one model for all tasks. Remedy: leave router={router!r} out.")
    if router not in (False, True, *ROUTERS):
        raise ConfigError(unknown_name("router", str(router), ROUTERS))
    if isinstance(inputs, Mapping):
        inputs = {task: inputs_of(given, task) for task, given in inputs.items()}
    if fabric is not None and fabric.global_rank > 0:
        resume, on_step, track = resume and resume.read_only(), None, untracked
    telling = {"on_step": on_step, "look_every": look_every, "track": track}
    options = {"resume": resume, "base": base, "fabric": fabric, **telling}
    problem = Problem(module, experts, inputs, forward, cache, encode_batch, **options)
    if chosen.whole and problem.team.sharded:
        raise ConfigError(f"fabric.strategy=fsdp with repair={kind}, which needs whole weights. Remedy: leave one out.")
    result = chosen.function(problem, **values)
    if router:
        add_router(result.model, problem, "linear" if router is True else router, values.get("seed", 0))
    return result


def add_router(model: Any, problem: Problem, kind: str, seed: int) -> None:
    """Give a model a router, fitted to the merged module's features of the problem's inputs."""
    features = {task: problem.merged_rows(task, inputs) for task, inputs in problem.inputs.items()}
    model.router = fit_router(features, kind=kind, seed=seed).to(device_of(problem.module))  # type: ignore[arg-type]
