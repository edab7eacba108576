"""Fisher merging: weights averaged by the diagonal of each expert's Fisher matrix. https://arxiv.org/abs/2111.09832

F_t = mean over inputs of Σ_y p(y|x) (∂ log p(y|x) / ∂θ)², by example and by class. The published rows of several
libraries square one gradient of a sum over the batch instead, which is not a Fisher matrix.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from suture.adaptation.loaded import InputMerge, LoadedModel, check_inputs
from suture.adaptation.network import Logits
from suture.checkpoints import Source
from suture.core.batches import Forward, Inputs, call, device_of, size, take, to_device
from suture.core.progress import Track, untracked
from suture.core.random import generator_for
from suture.errors import ConfigError, DataError
from suture.merging.overflow import refuse_overflow
from suture.merging.task_vectors import compute_dtype, open_task_vectors

_MANY = 32  # classes from which labels are drawn instead of summed over
_DRAWN = 2
_FEW = 0.01  # the share of entries above ε below which the result is close to an average


def fisher(
    module: nn.Module,
    base: Source,
    models: Mapping[str, Source] | Sequence[Source],
    inputs: Mapping[str, Inputs],
    logits: Logits | None = None,
    *,
    normalise: bool = True,
    floor: Literal["absolute", "relative"] = "absolute",
    epsilon: Annotated[float, Gt(0)] | None = None,
    labels: Annotated[int, Ge(1)] | None = None,
    seed: int = 0,
    forward: Forward = call,
    frozen: Sequence[str] = (),
    mixed_dtypes: bool = False,
    track: Track = untracked,
) -> InputMerge:
    """Merge all tensors as Σ c_t (F_t + ε) W_t / Σ c_t (F_t + ε), from unlabelled inputs and the experts' own heads.

    `logits` is as for `adapt`. With `normalise` c_t = 1 / (‖F_t‖ + ε) over the whole model, else 1. ε is `epsilon`,
    by default 1e-6, or with `floor="relative"` the share `epsilon`, by default 1e-3, of F_t's mean entry. The sum over
    classes is exact for up to 32 classes; for more, or with `labels`, so many labels (by default 2) are drawn for each
    input from the expert's p, seeded by `seed` and task. Tensors without a gradient are averaged. Each input takes one
    forward pass and a backward pass for each class; memory is that of four models.

    The warnings say how many labels were drawn, and the share of the entries of F_t above ε: where it is small, the
    result is close to an average. Raises `ConfigError` for inputs that do not match the models, and `DataError` if F_t
    is not finite.
    """
    vectors = open_task_vectors(base, models, frozen=frozen, mixed_dtypes=mixed_dtypes)
    check_inputs(vectors, inputs)
    model = LoadedModel(module, vectors)
    top = {name: torch.zeros(vectors.base.specs[name].shape, dtype=_dtype(vectors, name)) for name in model.names}
    bottom = {name: torch.zeros_like(tensor) for name, tensor in top.items()}
    warnings: list[str] = []
    with track("Fisher", sum(map(size, inputs.values()))) as advance:
        for task, rows in inputs.items():
            model.load(task)
            total = _Diagonal(model, task, forward, logits, labels, seed)
            for i in range(size(rows)):
                total.add(take(rows, slice(i, i + 1)))
                advance(1)
            diagonal = total.mean(size(rows))
            small = _epsilon(diagonal, floor, epsilon)
            warnings += total.notes(diagonal, small)
            share = 1 / (_norm(diagonal) + small) if normalise else 1.0
            for name in top:
                weight = share * (diagonal.get(name, torch.zeros(())) + small)
                top[name] += weight * vectors.models[task][name].to(top[name].dtype)
                bottom[name] += weight
    merged = model.merged()
    for name, tensor in top.items():
        tensor /= bottom[name]
        merged[name] = tensor.to(merged[name].dtype)
        refuse_overflow(name, tensor, merged[name])
    merged |= {alias: merged[name] for alias, name in vectors.base.aliases.items()}
    return InputMerge(merged, tuple(warnings))


class _Diagonal:
    """The diagonal of one expert's Fisher matrix, summed over inputs."""

    def __init__(
        self, model: LoadedModel, task: str, forward: Forward, logits: Logits | None, labels: int | None, seed: int
    ):
        self.model, self.task, self.forward, self.logits = model, task, forward, logits
        self.labels, self._drawn = labels, 0
        self._generator = generator_for(seed, f"{task}/fisher")
        state = model.module.state_dict(keep_vars=True)
        self._leaves = {name: t for name, target in model.names.items() if isinstance(t := state[target], nn.Parameter)}
        self._sums = {name: torch.zeros_like(leaf, dtype=_wide(leaf)) for name, leaf in self._leaves.items()}

    def add(self, inputs: Inputs) -> None:
        """Add one input: a batch of one."""
        with torch.enable_grad():
            for leaf in self._leaves.values():
                leaf.requires_grad_(True)
            logs = self._output(to_device(inputs, device_of(self.model.module))).log_softmax(-1)
            shares = self._shares(logs.detach().exp())
            chosen = shares.nonzero().flatten().tolist()
            for y in chosen:
                gradients = torch.autograd.grad(
                    logs[y], list(self._leaves.values()), retain_graph=y != chosen[-1], allow_unused=True
                )
                for name, gradient in zip(self._leaves, gradients, strict=True):
                    if gradient is not None:
                        self._sums[name].add_(gradient.to(self._sums[name].dtype).square(), alpha=float(shares[y]))

    def mean(self, count: int) -> dict[str, Tensor]:
        """F_t by name, on the CPU; raises `DataError` if it is not finite."""
        means = {name: (total / count).cpu() for name, total in self._sums.items()}
        for name, tensor in means.items():
            if not tensor.isfinite().all():
                raise DataError(
                    f"Task {self.task!r}: the gradients of '{name}' are not finite. Remedy: check inputs and expert."
                )
        return means

    def notes(self, diagonal: Mapping[str, Tensor], epsilon: float) -> list[str]:
        """The number of labels drawn, and the share of entries that count beside ε, one line each."""
        entries = sum(tensor.numel() for tensor in diagonal.values())
        above = sum(int((tensor > epsilon).sum()) for tensor in diagonal.values()) / max(1, entries)
        lines = [f"Task {self.task!r}: {self._drawn} labels drawn for each input, no sum over all classes."]
        if above < _FEW:
            low = f"only {above:.2%} of the Fisher entries are above ε = {epsilon:.1e}"
            lines.append(f"Task {self.task!r}: {low}, so the merge is close to an average. Remedy: floor=relative.")
        return lines if self._drawn else lines[1:]

    def _output(self, inputs: Inputs) -> Tensor:
        if callable(self.logits) and not isinstance(self.logits, Mapping | nn.ModuleDict):
            output = self.logits(self.model.module, inputs, self.task)
        else:
            output = self.forward(self.model.module, inputs)
            output = output if self.logits is None else self.logits[self.task](output)
        if output.dim() != 2 or len(output) != 1:
            raise ConfigError(f"The logits of one input have shape {tuple(output.shape)}; wanted (1, class).")
        return output[0]

    def _shares(self, probabilities: Tensor) -> Tensor:
        """The share of each class: its probability, or its part of the labels drawn."""
        classes = len(probabilities)
        if self.labels is None and classes <= _MANY:
            return probabilities
        self._drawn = self.labels or _DRAWN
        drawn = torch.multinomial(probabilities.cpu().double(), self._drawn, True, generator=self._generator)
        return torch.bincount(drawn, minlength=classes) / self._drawn


def _epsilon(diagonal: Mapping[str, Tensor], floor: str, epsilon: float | None) -> float:
    if floor == "absolute":
        return 1e-6 if epsilon is None else epsilon
    entries = sum(tensor.numel() for tensor in diagonal.values())
    mean = float(sum(tensor.sum(dtype=torch.float64) for tensor in diagonal.values())) / max(1, entries)
    return (1e-3 if epsilon is None else epsilon) * mean or 1e-30


def _norm(diagonal: Mapping[str, Tensor]) -> float:
    return float(sum(tensor.double().square().sum() for tensor in diagonal.values())) ** 0.5


def _wide(tensor: Tensor) -> torch.dtype:
    return compute_dtype(tensor.dtype)


def _dtype(vectors, name: str) -> torch.dtype:
    return compute_dtype(vectors.base.specs[name].dtype)
