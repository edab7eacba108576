"""AdaMerging: learn the merging coefficients from unlabelled inputs. https://arxiv.org/abs/2310.02575"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from suture.adaptation.captured import Steps, recorder_for
from suture.adaptation.coefficients import (
    Coefficients,
    Layout,
    effective,
    initial_values,
    layout,
    save_coefficients,
)
from suture.adaptation.feature_norm import FeatureNorm, norm_drift
from suture.adaptation.merged_model import MergedModel, matched_tensors
from suture.adaptation.network import Logits, Network, check_concatenation, depends_on_batch
from suture.adaptation.objectives import get_objective
from suture.adaptation.options import AdaMergingOptions
from suture.adaptation.passes import even_passes, passes
from suture.adaptation.rank_masks import mask_leaves
from suture.adaptation.schedules import get_schedule
from suture.adaptation.sharded_model import ShardedModel, refuse_unsharded
from suture.adaptation.trajectory import Trajectory
from suture.adaptation.vectors import task_vector_rows
from suture.checkpoints import Source, save_checkpoint
from suture.core.batches import Forward, ShuffledBatches, Upcoming, call
from suture.core.fabric import Team
from suture.core.notebooks import frame
from suture.core.progress import Profile
from suture.core.sharding import recompute_layers
from suture.errors import ConfigError, DataError, check_known
from suture.merging.merge import merge_task_vectors
from suture.merging.registry import get_method
from suture.merging.task_vectors import open_task_vectors
from suture.storage.resume import Resume
from suture.tasks.given import Given, batches_of

if TYPE_CHECKING:
    from pandas import DataFrame

    from suture.core.fabric import Fabric

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


@dataclass(frozen=True)
class AdaMergingResult:
    """The learned coefficients, the trajectory of the loop, and the merged model.

    - `coefficients`: the factors of the task vectors, after clamping or softmax if those are on.
    - `history`: (step + 1, task[, layer]) the optimizer's values before each step and after the last.
    - `losses`: (step,) the objective before each step, summed over tasks; nats for entropies.
    - `merged`: the merged checkpoint, name → tensor, in the base's dtypes, on the CPU.
    - `scores`: step → the number that `on_evaluation` returned.

    - `mask_logits`: with `rank_share`, name → (task, k) the logits of the components' masks, on where above 0.

    A run adds the `feature_norms` of the merged model and its experts, and a warning where they drift apart.
    """

    coefficients: Coefficients
    history: Tensor
    losses: Float[Tensor, " step"]
    merged: dict[str, Tensor]
    scores: dict[int, float] = field(default_factory=dict)
    feature_norms: dict[str, FeatureNorm] = field(default_factory=dict)
    mask_logits: dict[str, Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        shape = " × ".join(map(str, self.coefficients.values.shape))
        return (
            f"AdaMergingResult({shape} coefficients of {', '.join(self.coefficients.tasks)}, {len(self.losses)} steps)"
        )

    def to_pandas(self) -> "DataFrame":
        """The learned coefficients: one row for each layer, one column for each task."""
        values = self.coefficients.values
        rows = values.T.tolist() if values.ndim == 2 else [values.tolist()]
        layers = self.coefficients.layers or ["all"]
        lines = [(layer, *row) for layer, row in zip(layers, rows, strict=True)]
        return frame(("layer", *self.coefficients.tasks), lines, index="layer")

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings for the user, one line each."""
        return norm_drift(self.feature_norms)

    def save(self, folder: Path, also_as: str | None = None) -> None:
        """Write coefficients.safetensors and history.safetensors, and the coefficients as `also_as` too."""
        if also_as is not None:
            save_coefficients(self.coefficients, folder / also_as)
        save_coefficients(self.coefficients, folder / "coefficients.safetensors")
        save_checkpoint({"coefficients": self.history, "losses": self.losses}, folder / "history.safetensors")


def adapt(
    module: nn.Module,
    base: Source,
    models: Mapping[str, Source] | Sequence[Source],
    batches: Mapping[str, Given],
    logits: Logits | None = None,
    *,
    forward: Forward = call,
    batch_size: int = 16,
    seed: int = 0,
    frozen: Sequence[str] = (),
    mixed_dtypes: bool = False,
    fabric: "Fabric | None" = None,
    resume: Resume | None = None,
    profile: Profile | None = None,
    on_step: Callable[[int, float, Tensor], None] | None = None,
    eval_iterations: int = 0,
    on_evaluation: Callable[[int, nn.Module], float | None] | None = None,
    **options: Any,
) -> AdaMergingResult:
    """Learn the coefficients λ of θ = θ₀ + Σ λ_t τ_t by gradient descent on unlabelled inputs.

    `module` provides the architecture, the device, the mode (call `eval()` first unless you want dropout and batch
    statistics), and any tensors that the base lacks, such as a head. `module`, `base` and `models` are not changed.
    `batches` has inputs for each model's name: a list or loader of batches (tensors, or mappings of tensors for keyword
    arguments), which starts over at its end; or all inputs as one tensor, mapping, array or file, of which shuffled
    batches of `batch_size` are made. Each step uses one batch of every task. `logits` is a mapping task →
    head, which maps the output of `forward(module, inputs)` to (batch, class); or a function of (module, inputs, task);
    or None if the module returns logits. Tensors named in `frozen` stay at the base. The `options` (`lr`, `max_steps`,
    `granularity`, `objective`, …) are the fields of `AdaMergingOptions`.

    `fabric` sets device and precision, and distributes the inputs of each step over its processes. With the strategy
    fsdp of `make_fabric` weights and task vectors are split over them too; `module` may then be on the meta device, and
    only process 0 has `merged`. With `resume` an
    interrupted loop continues with bit-identical results. `profile` collects seconds by activity.
    `on_step(step, loss, values)` is called after each step, and `on_evaluation(step, module)` with the merged module
    every `eval_iterations` steps; the numbers it returns are the result's `scores`. The result depends only on the
    arguments, and on torch's generator if dropout is on.

    Raises `ConfigError` for an invalid option, `IncompatibleModels` for weights that do not fit together, and
    `DataError` if inputs run out or the objective is not finite.

    >>> module = nn.Linear(2, 2, bias=False)
    >>> base, tuned = {"weight": torch.zeros(2, 2)}, {"weight": torch.eye(2)}
    >>> result = adapt(module, base, {"parity": tuned}, {"parity": [torch.eye(2)]}, max_steps=5, lr=0.1)
    >>> result.coefficients.values.item() > 0.7  # from 0.3: larger coefficients make surer predictions
    True
    """
    chosen = AdaMergingOptions.of(options)
    objective = get_objective(chosen.objective)
    logits = dict(logits.items()) if isinstance(logits, nn.ModuleDict) else logits
    factor, max_steps = get_schedule(chosen.schedule, chosen.max_steps)
    vectors = open_task_vectors(base, models, frozen=frozen, mixed_dtypes=mixed_dtypes)
    if chosen.centred:
        average = get_method("simple_average")
        mean = merge_task_vectors(vectors, average, average.knobs.defaults)
        vectors = open_task_vectors(mean, models, frozen=frozen, mixed_dtypes=mixed_dtypes)
    arrangement = layout(chosen.granularity, tuple(vectors.models), matched_tensors(module, vectors)[0])
    values = initial_values(chosen.init_values, arrangement).requires_grad_()

    def spread() -> Tensor:
        return arrangement.spread(values, clamp=chosen.clamp_weights, softmax=chosen.softmax)

    spread()  # refuses clamp with softmax before any slow work
    batches = {task: batches_of(given, task, batch_size, seed) for task, given in batches.items()}
    _check(max_steps, batches, logits, arrangement)
    team, profile = Team(fabric), profile or Profile()
    concatenate = check_concatenation(chosen.concatenate, module, logits, chosen.micro_batch, device=team.device)

    if team.sharded:
        refuse_unsharded(chosen, objective, eval_iterations)
    with profile("construct the wrapped model"), team.autocast():
        if team.sharded:
            model = ShardedModel(module, vectors, chosen, team)
        else:
            model = MergedModel(module, vectors, task_vector_rows(vectors, chosen), team.device)
        if chosen.recompute:
            recompute_layers(model.module)
    masks = mask_leaves(model.separate)
    logits_of_masks = [masked.logits for masked in masks.values()]
    optimizer = _optimizer(chosen, [values, *logits_of_masks])
    network = Network(model, forward, logits, objective, profile)
    saving = resume if team.rank == 0 or resume is None else resume.read_only()
    trajectory = Trajectory(values, optimizer, saving, logits_of_masks)
    streams = {task: endless(task, batches[task], trajectory.step) for task in arrangement.tasks} if max_steps else {}
    left = range(max_steps - trajectory.step)
    upcoming = Upcoming(({task: next(stream) for task, stream in streams.items()} for _ in left), model.device)
    independent = depends_on_batch(module) is None
    recorder = recorder_for(model, objective.expert, independent) if chosen.capture else None
    steps = Steps(model, network, profile, recorder)
    cut = {"concatenate": concatenate, "micro_batch": chosen.micro_batch, "independent": independent}
    cut_up = even_passes if team.sharded else passes
    scores: dict[int, float] = {}
    with profile("test-time adaptation"), torch.enable_grad(), team.autocast(), model.collecting():
        while trajectory.step < max_steps:
            with profile("data loading"):
                work = cut_up(next(upcoming), **cut, rank=team.rank, world=team.world)
            if objective.expert:
                work = network.with_expert_outputs(work)
            coefficients = spread()
            loss, gradient = _read(team, steps(coefficients.detach(), work), coefficients.shape, upcoming)
            if not loss.isfinite():
                where = f"at step {trajectory.step}. Remedy: check the inputs, or lower lr={chosen.lr}."
                raise DataError(f"The objective is {loss.item()} {where}")
            with profile("optimizer step"):
                optimizer.zero_grad()
                optimizer.param_groups[0]["lr"] = chosen.lr * factor(trajectory.step, max_steps)
                coefficients.backward(gradient)  # ∂L/∂λ; the graph holds only the clamp and the shared columns
                for masked in masks.values():
                    masked.logits.grad = team.sum(masked.take_gradient())
                optimizer.step()
            trajectory.advance(loss.item(), last=trajectory.step + 1 == max_steps)
            if on_step is not None:
                on_step(trajectory.step - 1, trajectory.losses[-1], trajectory.history[-1])
            if on_evaluation is not None and eval_iterations and trajectory.step % eval_iterations == 0:
                with model.in_full(spread().detach()) as merged:
                    score = on_evaluation(trajectory.step, merged)
                scores |= {} if score is None else {trajectory.step: score}

    final = effective(values.detach(), clamp=chosen.clamp_weights, softmax=chosen.softmax)
    named = Coefficients(final, arrangement.tasks, arrangement.columns)
    losses = torch.tensor(trajectory.losses, dtype=torch.float64)
    merged, logits_by_name = model.merged(spread().detach()), {n: m.logits.detach() for n, m in masks.items()}
    return AdaMergingResult(named, torch.stack(trajectory.history), losses, merged, scores, mask_logits=logits_by_name)


def _read(team: Team, packed: Tensor, shape: torch.Size, upcoming: Upcoming) -> tuple[Tensor, Tensor]:
    """Loss and gradient, float64 on the CPU, summed over processes: the one time in a step that the device is read.

    While it still computes, the next step's inputs are sent to it.
    """
    upcoming.prepare()
    packed = team.sum(packed).to("cpu", torch.float64)
    return packed[-1], packed[:-1].view(shape)


def _optimizer(options: AdaMergingOptions, values: list[Tensor]) -> torch.optim.Optimizer:
    """Adam with the paper's betas (0.9, 0.999), AdamW or SGD, on the coefficients and the logits of masks."""
    lr, weight_decay = options.lr, options.weight_decay
    check_known("optimizer", [options.optimizer], OPTIMIZERS)
    if not lr > 0 or not weight_decay >= 0:
        raise ConfigError(f"lr={lr}, weight_decay={weight_decay}: wanted a positive lr and a decay of 0 or more.")
    return OPTIMIZERS[options.optimizer](values, lr=lr, weight_decay=weight_decay)


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


def endless(task: str, batches: Iterable[Any], start: int) -> Iterator[Any]:
    """Endless batches from that of step `start` on; an iterable that can be read again starts over at its end."""
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
            raise DataError(
                f"The inputs of task {task!r} ran out. Remedy: give more, or a list or loader that starts over."
            )
