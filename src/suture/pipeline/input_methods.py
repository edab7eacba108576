"""The methods `regmean`, `regmean_pp`, `esm` and `fisher`: closed forms over a few unlabelled inputs of each task."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le
from torch import Tensor

from suture.adaptation import InputMerge, esm, fisher, regmean, regmean_pp
from suture.core.batch_sizes import fixed_size
from suture.core.progress import bar
from suture.evaluation import SplitInputs, TaskInputs
from suture.pipeline.context import Context
from suture.pipeline.method_base import MethodBase, written
from suture.pipeline.models import Models
from suture.pipeline.repairs import RepairOptions
from suture.pipeline.results import MergeResult

_FLOAT64 = 8


@dataclass(frozen=True, kw_only=True)
class InputMethod(MethodBase, ABC):
    """A method that reads `num_inputs` unlabelled inputs of each task's `split`: the same ones as a repair."""

    name: ClassVar[str]

    split: Literal["train", "test"] = "train"
    num_inputs: Annotated[int, Ge(1)] = 256

    @property
    def label(self) -> str:
        """The name of the method's row in the report."""
        return self.name

    def problems(self, models: Models, tasks: tuple[str, ...]) -> list[str]:
        """Reasons why the run would fail later, one line each."""
        return models.unmatched(tasks)

    def memory(self, models: Models) -> int | None:
        """Bytes held besides the activations and Gram matrices: the merged model, an expert, and their sums."""
        return _FLOAT64 * 3 * models.vectors().stream().num_entries

    def merge(
        self, models: Models, inputs: SplitInputs, context: Context, out: Mapping[str, Tensor] | None = None
    ) -> MergeResult:
        """Merge on the chosen inputs, into the tensors `out` or into new ones."""
        options = RepairOptions(split=self.split, num_inputs=self.num_inputs)
        tasks = {name: inputs[self.split][name] for name in models.experts}
        _, few = options.select(inputs, models.experts, context.seed)
        given = (models.new_encoder(context.device.device), models.base, models.experts, few)
        shared = {"forward": context.device.call, "frozen": models.pool.frozen, "mixed_dtypes": True, "track": bar}
        with context.profile("merging weights"):
            result = self._merged(given, shared, tasks, context)
        how = f"weights, solved on up to {self.num_inputs} {self.split} inputs a task"
        return MergeResult(self.label, written(result.merged, out), how=how, warnings=result.warnings, split=self.split)

    @abstractmethod
    def _merged(
        self, given: tuple[Any, ...], shared: Mapping[str, Any], tasks: Mapping[str, TaskInputs], context: Context
    ) -> InputMerge:
        """The merge of module, base, models and inputs, with the arguments that all methods share."""


@dataclass(frozen=True, kw_only=True)
class RegMean(InputMethod):
    """Merge each linear layer and convolution by least squares on its own inputs in every expert.

    The entries of the Gram matrices off the diagonal are multiplied by `off_diagonal`. All other tensors are averaged.
    """

    name = "regmean"
    off_diagonal: Annotated[float, Ge(0), Le(1)] = 0.95

    def _merged(self, given, shared, tasks, context) -> InputMerge:
        return regmean(*given, off_diagonal=self.off_diagonal, batch_size=fixed_size(context.batch_size), **shared)


@dataclass(frozen=True, kw_only=True)
class RegMeanPP(InputMethod):
    """RegMean block by block, on the inputs that the merged blocks before give.

    `after_blocks=base` leaves what follows the blocks pretrained, as the authors do; `blocks` are as for surgery.
    """

    name = "regmean_pp"
    off_diagonal: Annotated[float, Ge(0), Le(1)] = 0.95
    after_blocks: Literal["mean", "base"] = "mean"
    blocks: str | list[str] | None = None

    def _merged(self, given, shared, tasks, context) -> InputMerge:
        own = {"off_diagonal": self.off_diagonal, "after_blocks": self.after_blocks, "blocks": self.blocks}
        sizes = {"batch_size": fixed_size(context.batch_size), "cache": context.encodings}
        return regmean_pp(*given, **own, **sizes, **shared)


@dataclass(frozen=True, kw_only=True)
class Esm(InputMethod):
    """Merge each linear layer and convolution in the directions in which the tasks' updates move its outputs.

    `alpha` is the factor of the whole update, which the authors search from 0 to 5. All other tensors are averaged.
    """

    name = "esm"
    alpha: Annotated[float, Ge(0)] = 1.0
    num_inputs: Annotated[int, Ge(1)] = 32

    def _merged(self, given, shared, tasks, context) -> InputMerge:
        return esm(*given, alpha=self.alpha, batch_size=fixed_size(context.batch_size), **shared)


@dataclass(frozen=True, kw_only=True)
class FisherMerging(InputMethod):
    """Average all tensors by the diagonal of each expert's Fisher matrix, by example and class.

    `normalise` divides each matrix by its norm over the model. ε is `epsilon`, by default 1e-6, or with
    `floor=relative` that share, by default 1e-3, of the mean entry. For more than 32 classes, or with `labels`, so many
    labels, by default 2, are drawn for each input instead of a sum over classes.
    """

    name = "fisher"
    normalise: bool = True
    floor: Literal["absolute", "relative"] = "absolute"
    epsilon: Annotated[float, Gt(0)] | None = None
    labels: Annotated[int, Ge(1)] | None = None

    def _merged(self, given, shared, tasks, context) -> InputMerge:
        heads = {name: task.logits for name, task in tasks.items()}
        own = {"normalise": self.normalise, "floor": self.floor, "epsilon": self.epsilon, "labels": self.labels}
        module, base, experts, inputs = given
        return fisher(module, base, experts, inputs, heads, **own, seed=context.seed, **shared)
