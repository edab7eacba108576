"""Everything that `method=` can name: the static merges, and the methods that learn from unlabelled inputs."""

from dataclasses import dataclass
from functools import cached_property

from suture.core.knobs import Knobs
from suture.errors import ConfigError, unknown_name
from suture.merging.registry import MergeMethod, methods
from suture.pipeline.adamerging import NAMES, AdaMerging, AdaMergingSurgery


@dataclass(frozen=True)
class LearnedMethod:
    """A method whose knobs are the fields of a class; `knobs.function(**values).run(stage)` learns."""

    name: str
    function: type
    paper: str
    aliases: tuple[str, ...] = ()

    @cached_property
    def knobs(self) -> Knobs:
        """The class's fields: names, defaults and what they may be."""
        return Knobs(self.name, self.function)


_LEARNED = (
    LearnedMethod("adamerging", AdaMerging, "https://arxiv.org/abs/2310.02575", tuple(NAMES)),
    LearnedMethod("surgery/adamerging_surgery", AdaMergingSurgery, "https://arxiv.org/abs/2402.02705"),
)


def all_methods() -> dict[str, MergeMethod | LearnedMethod]:
    """Static merges and learned methods by name, sorted."""
    return dict(sorted((methods() | {method.name: method for method in _LEARNED}).items()))


def find_method(name: str) -> MergeMethod | LearnedMethod:
    """The method of this name or alias; raises `ConfigError` with the nearest names."""
    named = {key: method for method in all_methods().values() for key in (method.name, *method.aliases)}
    if name not in named:
        raise ConfigError(unknown_name("method", name, named))
    return named[name]
