"""AdaMerging: learn the merging coefficients from unlabelled inputs. https://arxiv.org/abs/2310.02575"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from suture.adaptation.coefficients import Coefficients, Granularity, Layout, effective, initial_values, layout
from suture.adaptation.merged_model import MergedModel, matched_tensors
from suture.adaptation.network import Logits, Network, check_concatenation, depends_on_batch
from suture.adaptation.objectives import Objective, get_objective
from suture.adaptation.passes import passes
from suture.adaptation.schedules import Schedule, get_schedule
from suture.adaptation.trajectory import Trajectory
from suture.adaptation.vectors import task_vector_rows
from suture.checkpoints import Source
from suture.core.batches import Forward, ShuffledBatches, call, to_device
from suture.core.progress import Profile
from suture.core.team import Team
from suture.errors import ConfigError, DataError, unknown_name
from suture.merging.task_vectors import open_task_vectors
from suture.storage.resume import Resume

if TYPE_CHECKING:
    from lightning_fabric import Fabric

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


@dataclass(frozen=True)
class AdaMergingResult:
    """What adaptation found.

    - `coefficients`: what each task vector is multiplied with, clamped or normalised if that was asked for.
    - `history`: (step + 1, task[, layer]) the unknowns before each step and after the last, as the optimizer has them.
    - `losses`: (step,) the objective before each step, summed over tasks; nats for entropies.
    - `merged`: the merged checkpoint, name → tensor, in the base's dtypes, on the CPU.
    """

    coefficients: Coefficients
    history: Tensor
    losses: Float[Tensor, " step"]
    merged: dict[str, Tensor]


def adapt(
    module: nn.Module,
    base: Source,
    models: Mapping[str, Source] | Sequence[Source],
    batches: Mapping[str, Iterable[Any]],
    logits: Logits | None = None,
    *,
    forward: Forward = call,
    granularity: Granularity = "layer",
    objective: str | Objective = "entropy",
    optimizer: str = "adam",
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    init_values: Any = 0.3,
    clamp_weights: bool = False,
    softmax: bool = False,
    schedule: Schedule = "constant",
    max_steps: int | None = None,
    concatenate: bool | None = None,
    micro_batch: int | None = None,
    plus_plus: bool = False,
    threshold: float = 20.0,
    frozen: Sequence[str] = (),
    mixed_dtypes: bool = False,
    vectors_dtype: torch.dtype | None = None,
    stream_vectors: bool = False,
    fabric: "Fabric | None" = None,
    resume: Resume | None = None,
    profile: Profile | None = None,
    on_step: Callable[[int, float, Tensor], None] | None = None,
    eval_iterations: int = 0,
    on_evaluation: Callable[[int, nn.Module], None] | None = None,
) -> AdaMergingResult:
    """Learn the coefficients λ of θ = θ₀ + Σ λ_t τ_t by gradient descent on unlabelled inputs.

    `module` gives the architecture, the device, the mode (`eval()` it first unless dropout and batch statistics are
    wanted), and what the base lacks, as a head. It, `base` and `models` are not changed. `batches` has an iterable of
    inputs for each model's name: tensors, or mappings of tensors for keyword arguments. One batch of each is used a
    step; lists and loaders start over at their end. `logits` is a mapping task → head, from what
    `forward(module, inputs)` gives to (batch, class); or a function of (module, inputs, task); or None where the
    module gives logits.

    `granularity`, `init_values` and `objective`: see `layout`, `initial_values` and `OBJECTIVES`. `softmax` normalises
    over tasks. With `concatenate` all tasks share one forward and backward pass; by default where this is exact, but
    on a CPU only for networks below ten million parameters; `micro_batch` limits the inputs of one pass. `plus_plus`
    takes the trimmed, sign-agreeing rows of TIES with its `threshold`. `frozen` tensors stay at the base.

    `max_steps` is 1,000 by default, as published; `schedule="fast"` gets as far in 200 (see
    `suture.adaptation.schedules`). With `max_steps=0` it merges with `init_values`.

    Task vectors are held in `vectors_dtype`, or read anew from the checkpoints twice a step with `stream_vectors`.
    `fabric` gives device and precision, and shares the inputs of each step out over its processes. `resume` takes the
    loop up where it was left, to the same bits. `profile` is told where the time goes. `on_step(step, loss, values)`
    sees each step, `on_evaluation(step, module)` the merged module every `eval_iterations` steps. The result depends on
    the inputs only, and on torch's generator if dropout is on.

    Raises `ConfigError` for a bad option, `IncompatibleModels` for weights that do not fit, and `DataError` when
    inputs run out or the objective is not finite.

    >>> module = nn.Linear(2, 2, bias=False)
    >>> base, tuned = {"weight": torch.zeros(2, 2)}, {"weight": torch.eye(2)}
    >>> result = adapt(module, base, {"parity": tuned}, {"parity": [torch.eye(2)]}, max_steps=5, lr=0.1)
    >>> result.coefficients.values.item() > 0.7  # it grew from 0.3: the larger, the surer
    True
    """
    chosen, logits = get_objective(objective), dict(logits.items()) if isinstance(logits, nn.ModuleDict) else logits
    factor, max_steps = get_schedule(schedule, max_steps)
    vectors = open_task_vectors(base, models, frozen=frozen, mixed_dtypes=mixed_dtypes)
    arrangement = layout(granularity, tuple(vectors.models), matched_tensors(module, vectors)[0])
    values = initial_values(init_values, arrangement).requires_grad_()
    spread = lambda: arrangement.spread(values, clamp=clamp_weights, softmax=softmax)
    spread()
    descent = _optimizer(optimizer, values, lr, weight_decay)
    _check(max_steps, batches, logits, arrangement)
    team, profile = Team(fabric), profile or Profile()
    concatenate = check_concatenation(concatenate, module, logits, micro_batch, device=team.device)

    with profile("construct the wrapped model"):
        rows = task_vector_rows(
            vectors, plus_plus=plus_plus, threshold=threshold, dtype=vectors_dtype, streamed=stream_vectors
        )
        model = MergedModel(module, vectors, rows, team.device)
        del rows
    network = Network(model, forward, logits, chosen, profile)
    trajectory = Trajectory(values, descent, resume if team.rank == 0 or resume is None else resume.read_only())
    streams = {task: _endless(task, batches[task], trajectory.step) for task in arrangement.tasks} if max_steps else {}
    cut = {"concatenate": concatenate, "independent": depends_on_batch(module) is None, "micro_batch": micro_batch}
    with profile("test-time adaptation"), torch.enable_grad(), team.autocast(), model.collecting():
        while trajectory.step < max_steps:
            with profile("data loading"):
                inputs = {task: to_device(next(stream), model.device) for task, stream in streams.items()}
                work = passes(inputs, **cut, rank=team.rank, world=team.world)
            if chosen.expert:
                work = network.ask_experts(work)
            coefficients = spread()
            with profile("merging weights"):
                model.write(coefficients.detach())  # θ = θ₀ + Σ λ τ
            loss = team.sum(network.backward(work))  # ∂L/∂θ, each tensor's turned into ⟨∂L/∂θ, τ⟩
            gradient = team.sum(model.gradient())
            if not loss.isfinite():
                where = f"at step {trajectory.step}; check the inputs, or lower lr={lr}."
                raise DataError(f"The objective is {loss.item()} {where}")
            with profile("optimizer step"):
                descent.zero_grad()
                descent.param_groups[0]["lr"] = lr * factor(trajectory.step, max_steps)
                coefficients.backward(gradient)  # ∂L/∂λ, through the clamp and the sharing only
                descent.step()
            trajectory.advance(loss.item(), last=trajectory.step + 1 == max_steps)
            if on_step is not None:
                on_step(trajectory.step - 1, trajectory.losses[-1], trajectory.history[-1])
            if on_evaluation is not None and eval_iterations and trajectory.step % eval_iterations == 0:
                model.write(spread().detach())
                on_evaluation(trajectory.step, model.module)

    final = effective(values.detach(), clamp=clamp_weights, softmax=softmax)
    named = Coefficients(final, arrangement.tasks, arrangement.columns)
    losses = torch.tensor(trajectory.losses, dtype=torch.float64)
    return AdaMergingResult(named, torch.stack(trajectory.history), losses, model.merged(spread().detach()))


def _optimizer(name: str, values: Tensor, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Adam with the paper's betas (0.9, 0.999), AdamW or SGD, on the coefficients."""
    if name not in OPTIMIZERS:
        raise ConfigError(unknown_name("optimizer", name, OPTIMIZERS))
    if not lr > 0 or not weight_decay >= 0:
        raise ConfigError(f"lr={lr}, weight_decay={weight_decay}: wanted a positive lr and a decay of 0 or more.")
    return OPTIMIZERS[name]([values], lr=lr, weight_decay=weight_decay)


def _check(max_steps: int, batches: Mapping[str, Any], logits: Logits | None, arrangement: Layout) -> None:
    tasks = arrangement.tasks
    if not arrangement.tensors:
        raise ConfigError("There is nothing to merge: the base has no floating-point tensor that is not frozen.")
    if max_steps < 0:
        raise ConfigError(f"max_steps={max_steps}: wanted 0 or more.")
    given = {"batches": batches} if max_steps else {}
    if isinstance(logits, Mapping):
        given["logits"] = logits
    for kind, mapping in given.items():
        unmatched = sorted(set(mapping) ^ set(tasks))
        if unmatched:
            problem = "lacks" if unmatched[0] in tasks else "has something for"
            raise ConfigError(f"{kind} {problem} {unmatched[0]!r}; wanted one entry a model: {', '.join(tasks)}.")


def _endless(task: str, batches: Iterable[Any], start: int) -> Iterator[Any]:
    """Batch after batch from that of step `start` on; what can be read again starts over at its end."""
    if isinstance(batches, ShuffledBatches):
        yield from (batches[step] for step in count(start))
    while True:
        number = 0
        for batch in batches:
            number += 1
            if start > 0:
                start -= 1
            else:
                yield batch
        if number == 0:
            raise DataError(f"The inputs of task {task!r} ran out; give more, or a list or loader that starts over.")
