"""From inputs through the module to the objective: all tasks in one pass, or one task after another."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from suture.adaptation.flat import widest
from suture.adaptation.merged_model import MergedModel
from suture.adaptation.objectives import Objective
from suture.adaptation.passes import Part, Pass
from suture.adaptation.sharded_model import ShardedModel
from suture.core.batches import Forward, call, concatenate, device_of, evaluation_mode, size
from suture.core.progress import Profile
from suture.errors import ConfigError

__all__ = ["Forward", "Head", "Logits", "Network", "call", "check_concatenation", "depends_on_batch"]

Head = Callable[[Tensor], Tensor]
# Larger networks are faster task by task on a CPU, and need a fraction of the memory: see benchmarks/passes.py.
LARGE_ON_CPU = 10_000_000
Logits = Callable[[nn.Module, Any, str], Tensor] | Mapping[str, Head] | nn.ModuleDict


def check_concatenation(
    concatenate: bool | None,
    module: nn.Module,
    logits: Logits | None,
    micro_batch: int | None = None,
    *,
    device: torch.device | None = None,
) -> bool:
    """Whether to run all tasks in one batch; raises `ConfigError` for settings that would not be exact.

    By default it is done where it is exact and faster on `device`, or else the module's: on a CPU only for small ones.
    """
    if micro_batch is not None and (micro_batch < 1 or depends_on_batch(module)):
        reason = depends_on_batch(module) or "wanted 1 or more"
        raise ConfigError(f"micro_batch={micro_batch}: {reason}. Remedy: leave it out, or module.eval().")
    separate = logits is not None and not isinstance(logits, Mapping)
    reason = "`logits` is a function of one task" if separate else depends_on_batch(module)
    if concatenate and reason:
        raise ConfigError(f"concatenate=True, but {reason}. Remedy: concatenate=False, or module.eval().")
    return concatenate if concatenate is not None else not reason and _is_faster(module, device or device_of(module))


def _is_faster(module: nn.Module, device: torch.device) -> bool:
    return device.type != "cpu" or sum(parameter.numel() for parameter in module.parameters()) < LARGE_ON_CPU


def depends_on_batch(module: nn.Module) -> str | None:
    """The reason why an input's output depends on the rest of its batch or on chance; None if it does not."""
    for name, part in module.named_modules():
        normalises = isinstance(part, nn.modules.batchnorm._BatchNorm)
        if normalises and (part.training or part.running_mean is None):
            return f"'{name}' normalises by the statistics of the batch"
        if part.training and any(_is_dropout_rate(key, value) for key, value in vars(part).items()):
            return f"'{name}' has dropout on"
    return None


class Network:
    """The merged module with its heads and the objective."""

    def __init__(
        self,
        model: MergedModel | ShardedModel,
        forward: Forward,
        logits: Logits | None,
        objective: Objective,
        profile: Profile,
    ):
        self.model, self.forward = model, forward
        self.objective, self.profile = objective, profile
        takes_logits = objective.of == "logits"
        self.heads = logits if isinstance(logits, Mapping) and takes_logits else None
        self.logits = logits if callable(logits) and takes_logits else None

    def backward(self, passes: Sequence[Pass]) -> Tensor:
        """Backpropagate the objective, Σ over tasks of a mean over the batch, and return its value, on the device.

        Gradients are added up over passes before they are multiplied with task vectors: Σ⟨g_t, τ⟩ = ⟨Σ g_t, τ⟩.
        """
        total = torch.zeros((), dtype=widest(self.model.device), device=self.model.device)
        for i, parts in enumerate(passes):
            with self.profile("forward pass"):
                loss = self._loss(parts)
            with self.profile("backward pass"), self.model.waiting(i < len(passes) - 1):
                self.model.backward(loss)
            total += loss.detach()
        return total

    @torch.no_grad()
    def with_expert_outputs(self, passes: Sequence[Pass]) -> list[Pass]:
        """The same passes with the outputs of each task's fine-tuned model. Overwrites the merged weights."""
        targets: dict[tuple[int, int], Tensor] = {}
        for task in dict.fromkeys(part.task for parts in passes for part in parts):
            self.model.write_expert(task)
            with evaluation_mode(self.model.module):
                for i, parts in enumerate(passes):
                    for j, part in enumerate(parts):
                        if part.task == task:
                            targets[i, j] = self._output(part.inputs, task)
        return [[p._replace(target=targets[i, j]) for j, p in enumerate(parts)] for i, parts in enumerate(passes)]

    def _loss(self, parts: Pass) -> Tensor:
        def loss() -> Tensor:
            pairs = zip(self._outputs(parts), parts, strict=True)
            return torch.stack([part.share * self._objective(output, part) for output, part in pairs]).sum()

        return self.model.call(loss)

    def _outputs(self, parts: Pass) -> list[Tensor]:
        """The operands of the objective for each part."""
        if len(parts) == 1:
            return [self._output(parts[0].inputs, parts[0].task)]
        rows = _split(parts, self.forward(self.model.module, concatenate([part.inputs for part in parts])))
        return [self._after_head(output, part.task) for output, part in zip(rows, parts, strict=True)]

    def _output(self, batch: Any, task: str) -> Tensor:
        """The operand of the objective: logits, or features."""
        if self.logits is not None:
            return self.logits(self.model.module, batch, task)
        return self._after_head(self.forward(self.model.module, batch), task)

    def _after_head(self, output: Tensor, task: str) -> Tensor:
        return output if self.heads is None else self.heads[task](output)

    def _objective(self, output: Tensor, part: Part) -> Tensor:
        return self.objective.function(output, *(() if part.target is None else (part.target,)))


def _split(parts: Pass, output: Tensor) -> Sequence[Tensor]:
    """The rows of every part; an input may have several rows, such as one per pixel."""
    counts = [size(part.inputs) for part in parts]
    rows, rest = divmod(len(output), sum(counts))
    if rest or not rows:
        raise ConfigError(
            f"`forward` gives {len(output)} rows for {sum(counts)} inputs; wanted as many for each input. "
            "Remedy: let it give (batch, …), or rows that are an input's one after another."
        )
    return output.split([rows * count for count in counts])


def _is_dropout_rate(key: str, value: Any) -> bool:
    return (key == "p" or "drop" in key) and isinstance(value, float) and value > 0
