"""The methods for `method=…`: static merges, methods that learn from unlabelled inputs, and masks for tasks.

A method with its knobs set is used as `method.merge(models, inputs, context, out)`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor

from suture.core.knobs import Knobs
from suture.errors import check_known
from suture.evaluation import SplitInputs
from suture.merging.merge import merge_task_vectors
from suture.merging.registry import MergeMethod, methods
from suture.merging.wrapping import Wrapped, chosen_wrappers, wrapper_problems
from suture.pipeline.adamerging import NAMES, AdaMerging, AdaMergingSurgery
from suture.pipeline.context import Context
from suture.pipeline.input_methods import Esm, FisherMerging, RegMean, RegMeanPP
from suture.pipeline.models import Models
from suture.pipeline.repairs import Repair
from suture.pipeline.results import MergeResult
from suture.pipeline.task_masks import EmrMerging, TallMasks


class Method(Protocol):
    """A method with its knobs set.

    `static` is its registered merge, if it is one; `frozen` tensors stay at the base. `repairs` are part of the
    method, and replace `repair=…`.
    """

    @property
    def label(self) -> str: ...

    @property
    def knobs(self) -> Mapping[str, Any]: ...

    @property
    def static(self) -> MergeMethod | None: ...

    @property
    def frozen(self) -> tuple[str, ...]: ...

    @property
    def repairs(self) -> tuple[Repair, ...]: ...

    def problems(self, models: Models, tasks: tuple[str, ...]) -> list[str]:
        """Reasons why the merge would fail later, one line each; nothing is decoded or merged."""
        ...

    def memory(self, models: Models) -> int | None:
        """Bytes held besides the activations; None if that depends on the size of slices."""
        ...

    def merge(
        self, models: Models, inputs: SplitInputs, context: Context, out: Mapping[str, Tensor] | None = None
    ) -> MergeResult:
        """Merge into the tensors `out`, or into new ones."""
        ...


@dataclass(frozen=True)
class StaticMerge:
    """A registered merge method with its knobs set, and the wrappers around it. It needs no inputs."""

    static: MergeMethod
    knobs: Mapping[str, Any]
    repairs: tuple = ()
    after: tuple[Wrapped, ...] = ()

    @property
    def label(self) -> str:
        """The method's name, and those of its wrappers."""
        return "+".join([self.static.name, *(wrapper.name for wrapper, _ in self.after)])

    @property
    def frozen(self) -> tuple[str, ...]:
        """The tensors that `remove_keys` leaves at the base."""
        return tuple(self.knobs.get("remove_keys", ()))

    def problems(self, models: Models, tasks: tuple[str, ...]) -> list[str]:
        """Those of wrappers, beyond the preflight's."""
        return wrapper_problems(self.after, models.base.specs)

    def memory(self, models: Models) -> int | None:
        """None: it depends on the size of slices."""
        return None

    def merge(
        self, models: Models, inputs: SplitInputs, context: Context, out: Mapping[str, Tensor] | None = None
    ) -> MergeResult:
        """Stream the task vectors through the method."""
        with context.profile("merging weights"):
            merged = merge_task_vectors(models.vectors(self.frozen), self.static, self.knobs, out, self.after)
        return MergeResult(self.label, merged)


@dataclass(frozen=True)
class LearnedMethod:
    """A method whose knobs are the fields of a class; `function(**knobs)` returns a `Method`.

    `inputs`: it learns from unlabelled inputs, and so needs a task pool.
    """

    name: str
    function: type
    paper: str
    aliases: tuple[str, ...] = ()
    inputs: bool = True

    @cached_property
    def knobs(self) -> Knobs:
        """The class's fields: names, defaults and allowed values."""
        return Knobs(self.name, self.function)


def learned_methods() -> dict[str, LearnedMethod]:
    """The methods that learn, or leave a model for each task, by name."""
    paper, surgery = "https://arxiv.org/abs/2310.02575", "surgery/adamerging_surgery"
    return {
        "emr_merging": LearnedMethod(
            "emr_merging", EmrMerging, "https://arxiv.org/abs/2405.17461", ("emr",), inputs=False
        ),
        "tall_masks": LearnedMethod("tall_masks", TallMasks, "https://arxiv.org/abs/2405.07813", inputs=False),
        "adamerging": LearnedMethod("adamerging", AdaMerging, paper, tuple(NAMES)),
        surgery: LearnedMethod(surgery, AdaMergingSurgery, "https://arxiv.org/abs/2402.02705"),
        "regmean": LearnedMethod("regmean", RegMean, "https://arxiv.org/abs/2212.09849"),
        "regmean_pp": LearnedMethod("regmean_pp", RegMeanPP, "https://arxiv.org/abs/2508.03121", ("regmean++",)),
        "esm": LearnedMethod("esm", Esm, "https://arxiv.org/abs/2602.20208"),
        "fisher": LearnedMethod("fisher", FisherMerging, "https://arxiv.org/abs/2111.09832"),
    }


def all_methods() -> dict[str, MergeMethod | LearnedMethod]:
    """Static merges and learned methods by name, sorted."""
    return dict(sorted((methods() | learned_methods()).items()))


def find_method(name: str) -> MergeMethod | LearnedMethod:
    """The method of this name or alias; raises `ConfigError` with the nearest names."""
    named = {key: method for method in all_methods().values() for key in (method.name, *method.aliases)}
    check_known("method", [name], named)
    return named[name]


def chosen_method(name: str, values: Mapping[str, Any]) -> Method:
    """A method with its knobs set and checked.

    For a method whose names imply different settings, `name` is a knob too. `after` names wrappers around a static
    merge.
    """
    method, values = find_method(name), dict(values)
    after = chosen_wrappers(values.pop("after", None)) if isinstance(method, MergeMethod) else []
    if "name" in method.knobs.defaults and name != method.name:
        values["name"] = name
    knobs = method.knobs.validate(values)
    static = methods().get(method.name)
    if static is None:
        return learned_methods()[method.name].function(**knobs)
    return StaticMerge(static, knobs, after=tuple(after))
