"""Model families: building a model, encoding a batch, making a head. One file per family."""

import importlib
import pkgutil
from importlib.metadata import entry_points

from suture.errors import ConfigError, unknown_name
from suture.families.shared.base import Encoder, Family, companion_files

__all__ = ["Encoder", "Family", "companion_files", "families", "family"]

_GROUP = "suture.families"  # entry points of other packages


def families() -> list[str]:
    """The names of all families, sorted: the built-in ones and those of installed packages' entry points."""
    return sorted({*_built_in(), *(entry.name for entry in entry_points(group=_GROUP))})


def family(name: str) -> type[Family]:
    """The family of this name; raises `ConfigError` with the nearest names for an unknown one."""
    if name in _built_in():
        return importlib.import_module(f"{__name__}.{name}").FAMILY
    if name not in families():
        raise ConfigError(unknown_name("model family", name, families()))
    return next(entry.load() for entry in entry_points(group=_GROUP) if entry.name == name)


def _built_in() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg]
