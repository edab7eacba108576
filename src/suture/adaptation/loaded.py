"""A copy of a module into which the models of a merge are loaded, one after another."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from suture.adaptation.blocks import frozen_copy
from suture.adaptation.merged_model import matched_tensors
from suture.core.batches import Inputs, size
from suture.errors import ConfigError, DataError
from suture.merging.overflow import refuse_overflow
from suture.merging.task_vectors import TaskVectors, compute_dtype


@dataclass(frozen=True)
class InputMerge:
    """A model that was merged with the help of unlabelled inputs, in closed form.

    - `merged`: the merged checkpoint, name → tensor, in the base's dtypes, on the CPU.
    - `warnings`: warnings for the user, one line each.
    """

    merged: dict[str, Tensor]
    warnings: tuple[str, ...] = ()


class LoadedModel:
    """A copy of a module in evaluation mode, without gradients. `names`: name in the checkpoints → in the module."""

    def __init__(self, module: nn.Module, vectors: TaskVectors):
        self.vectors = vectors
        self.names = dict(zip(*matched_tensors(module, vectors), strict=True))
        self.module = frozen_copy(module)
        for parameter in self.module.parameters():  # the caller's memory is not written to
            parameter.data = parameter.data.clone()
        self._state = self.module.state_dict()
        for name in vectors.unchanged:
            if name in self._state:
                self._state[name].copy_(vectors.base[name])

    def load(self, task: str, prefix: str = "") -> None:
        """Copy in the weights of one fine-tuned model, or those whose names in the module begin with `prefix`."""
        for name, target in self.names.items():
            if target.startswith(prefix):
                self._state[target].copy_(self.vectors.models[task][name])

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy in merged tensors, by their names in the checkpoints."""
        for name, tensor in tensors.items():
            if name in self.names:
                self._state[self.names[name]].copy_(tensor)

    def tensor(self, target: str) -> Tensor:
        """One of the module's own tensors, by its name in the module."""
        return self._state[target]

    def merged(self, chosen: Sequence[str] = (), scale: float = 1.0) -> dict[str, Tensor]:
        """The checkpoint with the tensors `chosen`, by name in the module, from the module and all others their mean.

        `scale` is the factor of the mean task vector. Raises `IncompatibleModels` for a result that is too large for
        its dtype.
        """
        merged = {name: self.mean(name, scale) for name in self.names}
        for name, target in self.names.items():
            if target in set(chosen):
                merged[name] = self._state[target].detach().to("cpu", self.vectors.base.specs[name].dtype, copy=True)
        base = self.vectors.base
        merged |= {name: base[name].to("cpu", copy=True) for name in self.vectors.unchanged}
        return merged | {alias: merged[name] for alias, name in base.aliases.items()}

    def exact_means(self, targets: Iterable[str]) -> dict[str, Tensor]:
        """The means of some tensors over all fine-tuned models, by name in the module, in float64."""
        names = {target: name for name, target in self.names.items()}
        means = {}
        for target in set(targets):
            total = torch.zeros(self._state[target].shape, dtype=torch.float64)
            for model in self.vectors.models.values():
                total += model[names[target]]
            means[target] = total.div_(len(self.vectors.models)).to(self._state[target].device)
        return means

    def exact_base(self, targets: Iterable[str]) -> dict[str, Tensor]:
        """Some tensors of the base, by name in the module, in float64."""
        names = {target: name for name, target in self.names.items()}
        return {each: self.vectors.base[names[each]].to(self._state[each].device).double() for each in set(targets)}

    def mean(self, name: str, scale: float = 1.0) -> Tensor:
        """The mean of a tensor over all fine-tuned models, or base + `scale` · (mean − base), in the base's dtype."""
        spec = self.vectors.base.specs[name]
        total = torch.zeros(spec.shape, dtype=compute_dtype(spec.dtype))
        for model in self.vectors.models.values():
            total += model[name]
        mean = total / len(self.vectors.models)
        if scale != 1:
            start = self.vectors.base[name].to(mean.dtype)
            mean = start + scale * (mean - start)
        stored = mean.to(spec.dtype)
        refuse_overflow(name, mean, stored)
        return stored


def check_inputs(vectors: TaskVectors, inputs: Mapping[str, Inputs]) -> None:
    """Raise an error unless there are inputs for every model, and for nothing else."""
    unmatched = sorted(set(inputs) ^ set(vectors.models))
    if unmatched:
        problem = "lack" if unmatched[0] in vectors.models else "have something for"
        raise ConfigError(
            f"inputs {problem} {unmatched[0]!r}; wanted one entry a model: {', '.join(sorted(vectors.models))}."
        )
    for task, rows in inputs.items():
        if size(rows) == 0:
            raise DataError(f"Task {task!r} has no inputs. Remedy: give some.")
