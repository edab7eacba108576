"""AdaMerging: learn the merging coefficients from unlabelled inputs. https://arxiv.org/abs/2310.02575"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from suture.adaptation.coefficients import Coefficients, Granularity, Layout, effective, initial_values, layout
from suture.adaptation.forward import Forward, Logits, Network, call, check_concatenation
from suture.adaptation.merged_model import MergedModel, matched_tensors, task_vector_rows
from suture.adaptation.objectives import Objective, get_objective
from suture.adaptation.schedules import Schedule, get_schedule
from suture.batches import to_device
from suture.checkpoints import Source
from suture.errors import ConfigError, DataError, unknown_name
from suture.task_vectors import open_task_vectors

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
    plus_plus: bool = False,
    threshold: float = 20.0,
    frozen: Sequence[str] = (),
    mixed_dtypes: bool = False,
    vectors_dtype: torch.dtype | None = None,
    on_step: Callable[[int, float, Tensor], None] | None = None,
) -> AdaMergingResult:
    """Learn the coefficients λ of θ = θ₀ + Σ λ_t τ_t by gradient descent on unlabelled inputs.

    `module` gives the architecture, the device, the mode (`eval()` it first unless dropout and batch statistics are
    wanted), and what the base lacks, as a head. It, `base` and `models` are not changed. `batches` has an iterable of
    inputs for each model's name: tensors, or mappings of tensors for keyword arguments. One batch of each is used a
    step; lists and loaders start over at their end. `logits` is a mapping task → head, from what
    `forward(module, inputs)` gives to (batch, class); or a function of (module, inputs, task); or None where the
    module gives logits.

    `granularity`, `init_values` and `objective`: see `layout`, `initial_values` and `OBJECTIVES`. `softmax` normalises
    over tasks. With `concatenate` all tasks share one forward and backward pass; by default where this is exact.
    `plus_plus` takes the trimmed, sign-agreeing rows of TIES with its `threshold`. `frozen` tensors stay at the base.
    `vectors_dtype` holds the task vectors in less memory. `on_step(step, loss, values)` sees each step. `max_steps` is
    1,000 by default, as published; `schedule="fast"` gets as far in 200 (see `suture.adaptation.schedules`). With
    `max_steps=0` it merges with `init_values`. The result depends on the inputs only, and on torch's generator if
    dropout is on.

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
    concatenate = check_concatenation(concatenate, module, logits)

    rows = task_vector_rows(vectors, plus_plus=plus_plus, threshold=threshold, dtype=vectors_dtype)
    model = MergedModel(module, vectors, rows)
    del rows
    network = Network(model, forward, logits, chosen)
    streams = {task: _endless(task, batches[task]) for task in arrangement.tasks} if max_steps else {}
    history, losses = [values.detach().clone()], []
    with torch.enable_grad(), model.collecting():
        for step in range(max_steps):
            inputs = {task: to_device(next(stream), model.device) for task, stream in streams.items()}
            wanted = network.experts(inputs) if chosen.expert else {}
            coefficients = spread()
            model.write(coefficients.detach())  # θ = θ₀ + Σ λ τ
            loss = network.backward(inputs, wanted, concatenate)  # ∂L/∂θ, each tensor's turned into ⟨∂L/∂θ, τ⟩
            if not loss.isfinite():
                raise DataError(f"The objective is {loss.item()} at step {step}; check the inputs, or lower lr={lr}.")
            descent.zero_grad()
            descent.param_groups[0]["lr"] = lr * factor(step, max_steps)
            coefficients.backward(model.gradient())  # ∂L/∂λ, through the clamp and the sharing only
            descent.step()
            history.append(values.detach().clone())
            losses.append(loss.item())
            if on_step is not None:
                on_step(step, losses[-1], history[-1])

    final = effective(values.detach(), clamp=clamp_weights, softmax=softmax)
    named = Coefficients(final, arrangement.tasks, arrangement.columns)
    merged = model.merged(spread().detach())
    return AdaMergingResult(named, torch.stack(history), torch.tensor(losses, dtype=torch.float64), merged)


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


def _endless(task: str, batches: Iterable[Any]) -> Iterator[Any]:
    """Batch after batch; what can be read again starts over at its end."""
    while True:
        count = 0
        for batch in batches:
            count += 1
            yield batch
        if count == 0:
            raise DataError(f"The inputs of task {task!r} ran out; give more, or a list or loader that starts over.")
