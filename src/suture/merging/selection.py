"""The choice of the tensors to merge: `frozen`, `keep` and `only`, by name or pattern, with one meaning everywhere."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from suture.checkpoints import Checkpoint
from suture.errors import ConfigError, shown


@dataclass(frozen=True)
class Selection:
    """Names or patterns of tensors (* stands for anything).

    - `frozen` and `keep`: stay at the base, whatever the models have there: other weights, another shape, or nothing.
      Tensors of these names that only models have are left out.
    - `only`: everything else stays at the base likewise.
    """

    frozen: Sequence[str] = ()
    keep: Sequence[str] = ()
    only: Sequence[str] = ()

    def __bool__(self) -> bool:
        return bool(self.frozen or self.keep or self.only)


class Selected(NamedTuple):
    """The models without what is left out, and the names in the base that stay there."""

    models: dict[str, Checkpoint]
    frozen: tuple[str, ...]


def select(base: Checkpoint, models: Mapping[str, Checkpoint], selection: Selection) -> Selected:
    """The tensors that a selection leaves; raises `ConfigError` for a pattern that fits no tensor at all."""
    names = set(base).union(*models.values())
    for key in ("frozen", "keep", "only"):
        for pattern in getattr(selection, key):
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ConfigError(
                    f"{key}: '{shown(pattern)}' is the name of no tensor. Remedy: give names or patterns."
                )
    stays = {name for name in base if _stays(name, selection)}
    if selection and stays == set(base):
        raise ConfigError("frozen, keep and only leave nothing to merge. Remedy: leave out fewer tensors.")
    tied = {alias for alias, name in base.aliases.items() if name in stays}
    left = {label: _without(base, model, selection) for label, model in models.items()}
    return Selected(left, tuple(sorted(stays | tied)))


def _stays(name: str, selection: Selection) -> bool:
    chosen = not selection.only or _fits(name, selection.only)
    return not chosen or _fits(name, (*selection.frozen, *selection.keep))


def _without(base: Checkpoint, model: Checkpoint, selection: Selection) -> Checkpoint:
    """A model without the tensors that the base lacks and that the selection leaves out."""
    every = (*selection.frozen, *selection.keep)
    out = {
        name
        for name in model
        if name not in base and (_fits(name, every) or (selection.only and not _fits(name, selection.only)))
    }
    return model.select({name: name for name in model if name not in out}) if out else model


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
