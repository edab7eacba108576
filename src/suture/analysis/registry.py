"""The registry of analyses: every function of this package that is decorated with `analysis_kind`.

An analysis is one function that returns a `Finding`; a second one, decorated with `draws`, makes its chart.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from suture.analysis.finding import Finding
from suture.core.discovery import import_all
from suture.core.knobs import Knobs
from suture.errors import check_known

Reads = Literal["weights", "tasks", "features"]
F = TypeVar("F", bound=Callable[..., Finding])

_ANALYSES: dict[str, "Analysis"] = {}


@dataclass(frozen=True)
class Analysis:
    """One analysis. `reads` says what its function takes:

    - "weights": `function(base, models, *, frozen, **knobs)`
    - "tasks": `function(module, base, models, tasks, *, frozen, batch_size, track, **knobs)`
    - "features": `function(merged, experts, inputs, *, batch_size, track, **knobs)`

    `keys`: the knobs that the command line takes, each with its explanation.
    """

    name: str
    function: Callable[..., Finding]
    reads: Reads
    keys: Mapping[str, str] = field(default_factory=dict)

    @property
    def defaults(self) -> dict[str, object]:
        """The defaults of the command line's knobs, as the signature has them."""
        known = Knobs(self.name, self.function).defaults
        return {key: known[key] for key in self.keys}


def analysis_kind(*, reads: Reads, keys: Mapping[str, str] | None = None) -> Callable[[F], F]:
    """Register the decorated function as an analysis under its own name, with the fields of `Analysis`."""

    def register(function: F) -> F:
        name = function.__name__
        _ANALYSES[name] = Analysis(name, function, reads, keys or {})
        return function

    return register


def analysis_kinds() -> dict[str, Analysis]:
    """All analyses by name, sorted by what they read."""
    import_all("suture.analysis")
    order = ("weights", "tasks", "features")
    return {each.name: each for each in sorted(_ANALYSES.values(), key=lambda each: order.index(each.reads))}


def get_analysis(name: str) -> Analysis:
    """The analysis of this name; raises `ConfigError` with the nearest names."""
    known = analysis_kinds()
    check_known("analysis", [name], known)
    return known[name]
