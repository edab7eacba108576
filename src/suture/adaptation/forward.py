"""Inputs through the module and on to the objective: all tasks in one pass, or one task after another."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from suture.adaptation.merged_model import MergedModel
from suture.adaptation.objectives import Objective
from suture.batches import concatenate as concatenate_batches
from suture.batches import size
from suture.errors import ConfigError

Forward = Callable[[nn.Module, Any], Tensor]
Head = Callable[[Tensor], Tensor]
Logits = Callable[[nn.Module, Any, str], Tensor] | Mapping[str, Head] | nn.ModuleDict


def call(module: nn.Module, inputs: Any) -> Tensor:
    """What the module gives for a batch: (batch, …). Mappings are keyword arguments; of an output with `logits`, those.

    Raises `ConfigError` if the module gives anything else, and for a batch that is a tuple.
    """
    if isinstance(inputs, tuple | list):
        raise ConfigError("A batch is a tuple; give forward=lambda module, batch: module(batch[0]), or inputs alone.")
    output = module(**inputs) if isinstance(inputs, Mapping) else module(inputs)
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        kind = type(output).__name__
        raise ConfigError(f"The module gives a {kind}, not a tensor; give forward=lambda module, inputs: …")
    return found


def check_concatenation(concatenate: bool | None, module: nn.Module, logits: Logits | None) -> bool:
    """Whether to run all tasks in one batch; `ConfigError` where that is asked for and would not be exact."""
    separate = logits is not None and not isinstance(logits, Mapping)
    reason = "`logits` is a function of one task" if separate else depends_on_batch(module)
    if concatenate and reason:
        raise ConfigError(f"concatenate=True, but {reason}. Remedy: concatenate=False, or module.eval().")
    return not reason if concatenate is None else concatenate


def depends_on_batch(module: nn.Module) -> str | None:
    """Why an input's output depends on what else is in its batch or on chance; None if it does not."""
    for name, part in module.named_modules():
        normalises = isinstance(part, nn.modules.batchnorm._BatchNorm)
        if normalises and (part.training or part.running_mean is None):
            return f"'{name}' normalises by the statistics of the batch"
        if part.training and any(_is_dropout_rate(key, value) for key, value in vars(part).items()):
            return f"'{name}' has dropout on"
    return None


class Network:
    """The merged module with its heads and the objective."""

    def __init__(self, model: MergedModel, forward: Forward, logits: Logits | None, objective: Objective):
        self.model, self.forward, self.objective = model, forward, objective
        wants_logits = objective.of == "logits"
        self.heads = logits if isinstance(logits, Mapping) and wants_logits else None
        self.logits = logits if callable(logits) and wants_logits else None

    def backward(self, inputs: Mapping[str, Any], wanted: Mapping[str, Tensor], concatenate: bool) -> Tensor:
        """Backpropagate the objective, Σ over tasks of a mean over the batch, and give its value."""
        joined = concatenate_batches(list(inputs.values())) if concatenate else None
        if joined is not None:
            return self._backward_at_once(inputs, joined, wanted)
        total, last = torch.zeros((), dtype=torch.float64), len(inputs) - 1
        for i, (task, batch) in enumerate(inputs.items()):
            loss = self._loss(self._seen(batch, task), wanted.get(task))
            with self.model.waiting(i < last):  # tasks are summed first: Σ⟨g_t, τ⟩ = ⟨Σ g_t, τ⟩
                self.model.backward(loss)
            total += loss.detach().cpu()
        return total

    @torch.no_grad()
    def experts(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """What each task's fine-tuned model gives for its batch, in evaluation mode. Writes over the merged weights."""
        outputs = {}
        for task, batch in inputs.items():
            self.model.write_expert(task)
            with _evaluating(self.model.module):
                outputs[task] = self._seen(batch, task)
        return outputs

    def _backward_at_once(self, inputs: Mapping[str, Any], joined: Any, wanted: Mapping[str, Tensor]) -> Tensor:
        outputs = self.forward(self.model.module, joined).split([size(batch) for batch in inputs.values()])
        losses = [
            self._loss(self._after_head(output, task), wanted.get(task))
            for task, output in zip(inputs, outputs, strict=True)
        ]
        loss = torch.stack(losses).sum()
        self.model.backward(loss)
        return loss.detach().to("cpu", torch.float64)

    def _seen(self, batch: Any, task: str) -> Tensor:
        """What the objective looks at: logits, or features."""
        if self.logits is not None:
            return self.logits(self.model.module, batch, task)
        return self._after_head(self.forward(self.model.module, batch), task)

    def _after_head(self, output: Tensor, task: str) -> Tensor:
        return output if self.heads is None else self.heads[task](output)

    def _loss(self, seen: Tensor, wanted: Tensor | None) -> Tensor:
        return self.objective.function(seen) if wanted is None else self.objective.function(seen, wanted)


def _is_dropout_rate(key: str, value: Any) -> bool:
    return (key == "p" or "drop" in key) and isinstance(value, float) and value > 0


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = [(part, part.training) for part in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for part, training in modes:
            part.training = training
