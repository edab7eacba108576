"""The registry of merge methods.

A method is one function of tensors. Its positional arguments are its operands: `base` and either `deltas` (task
vectors, fine-tuned − base) or `models` (the fine-tuned weights), both stacked along a first `task` axis. Its
keyword-only arguments are the knobs; the configuration schema, `--help` and the documentation are read from them.

A method on whole matrices is a function of `deltas` (task, out, in) alone that returns the update M (out, in) of one
matrix. What all of them share is done for them: the base, the factor `alpha`, and the tensors that are no matrices.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from math import inf
from typing import Any, Literal, TypeVar

from suture.core.discovery import import_all
from suture.core.knobs import Knobs
from suture.errors import ConfigError, unknown_name
from suture.merging.roles import MatrixOptions

_METHODS: dict[str, "MergeMethod"] = {}
_ALIASES: dict[str, str] = {}
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class MergeMethod:
    """One registered method: its function, its paper and its knobs.

    - `gather(stream, **knobs)`, for methods that must see a whole tensor first, or the whole model with `scope=model`:
      reads the stream of rows and returns the `statistic` that the function takes.
    - `vote(base, deltas, statistic, **knobs)` merges like the function and also returns the votes that must be counted
      over the whole model before some entries can be decided.
    - `whole_rows`: slices are whole rows of a matrix.
    - `num_models`: the fewest and the most models that can be merged.
    - `searches`: the number of a row's order statistics that are searched for at once, each of which takes memory.
    - `passes(**knobs)`: the number of times a tensor is read, where it is not one, or two with `gather`.
    - `matrices`: the function takes one matrix of every task and returns its update. `workspace` is what it holds
      besides, in float64 matrices of that size, and `square` in square ones of the inner side.
    - `scale`: the knob that is a factor of the whole update, if there is one: base + scale · update.

    A function with an argument `position` gets the `SlicePosition` of its slice.
    """

    name: str
    function: Callable[..., Any]
    paper: str
    aliases: tuple[str, ...] = ()
    gather: Callable[..., Any] | None = None
    vote: Callable[..., Any] | None = None
    whole_rows: bool = False
    num_models: tuple[int, float] = (1, inf)
    searches: int = 0
    passes: Callable[..., int] | None = None
    matrices: bool = False
    workspace: int = 0
    square: int = 0
    scale: str | None = None

    @cached_property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.function).parameters

    @cached_property
    def knobs(self) -> Knobs:
        """The function's knobs: names, defaults and allowed values."""
        return Knobs(self.name, self.function, shared=MatrixOptions if self.matrices else None)

    @property
    def operand(self) -> Literal["deltas", "models"]:
        """The function's operand beside the base: task vectors, or the models' own weights."""
        return "models" if "models" in self._parameters else "deltas"

    @property
    def tensors(self) -> str:
        """The treatment of each kind of tensor, in a sentence or two."""
        if not self.matrices:
            return "All floating-point tensors are merged alike, whatever they are in the model."
        return (
            "By the method: linear layers, convolution kernels as matrices (out, in · height · width), and each expert "
            "of a stack; q, k and v in one tensor as one matrix, or each by itself with split. Biases, norms, "
            "embeddings, positions, heads and kernels on the raw input take the mean of the task vectors, times alpha, "
            "or stay at the base with vectors=base. as_matrix and as_vector correct what a name or shape misleads."
        )

    @property
    def takes_position(self) -> bool:
        """Whether the function takes a `SlicePosition`, as methods that draw random numbers do."""
        return "position" in self._parameters

    def times_read(self, knobs: Mapping[str, Any]) -> int:
        """The number of times a tensor is read; the search for an order statistic may need one more pass."""
        if self.passes is not None:
            return self.passes(**{**self.knobs.defaults, **knobs})
        return 1 if self.gather is None else 2

    def check_number(self, count: int) -> str | None:
        """One line if this method cannot merge `count` models, else None."""
        least, most = self.num_models
        if least <= count <= most:
            return None
        expected = f"{least}" if least == most else f"{least} or more" if most == inf else f"{least} to {most}"
        return f"{self.name} merges {expected} fine-tuned model{'s' * (most > 1)} beside the base; found {count}."


def merge_method(*, paper: str, aliases: tuple[str, ...] = (), **properties: Any) -> Callable[[F], F]:
    """Register the decorated function as a merge method under its own name; `properties` are those of `MergeMethod`."""

    def register(function: F) -> F:
        name = function.__name__
        _METHODS[name] = MergeMethod(name, function, paper, aliases, **properties)
        _ALIASES.update(dict.fromkeys(aliases, name))
        return function

    return register


def matrix_method(*, paper: str, workspace: int, square: int = 0, aliases: tuple[str, ...] = ()) -> Callable[[F], F]:
    """Register the decorated function of `deltas` (task, out, in) as a merge method on whole matrices."""
    size = {"workspace": workspace, "square": square}
    return merge_method(paper=paper, aliases=aliases, matrices=True, scale="alpha", **size)


def methods() -> dict[str, MergeMethod]:
    """All registered methods by name, sorted: those of `suture.merging.methods` and your own."""
    _find()
    return dict(sorted(_METHODS.items()))


def get_method(name: str) -> MergeMethod:
    """The method of this name or alias; raises `ConfigError` with the nearest names."""
    _find()
    name = _ALIASES.get(name, name)
    if name not in _METHODS:
        raise ConfigError(unknown_name("method", name, [*_METHODS, *_ALIASES]))
    return _METHODS[name]


@cache
def _find() -> None:
    """Import every module of `suture.merging.methods`, so that its methods register themselves."""
    import_all("suture.merging.methods")
