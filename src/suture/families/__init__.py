"""Families of models: how to build one, encode a batch, make a head. One file for each family."""

import importlib
import pkgutil

from suture.errors import ConfigError, unknown_name
from suture.families.base import Encoder, Family, Track, companion_files, untracked

__all__ = ["Encoder", "Family", "Track", "companion_files", "families", "family", "untracked"]

_SHARED = ("base", "classification", "heads", "models", "pictures", "spelling", "taken_apart", "texts")


def families() -> list[str]:
    """The names of all families, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _SHARED)


def family(name: str) -> type[Family]:
    """The family of this name; raises `ConfigError` with the nearest name."""
    if name not in families():
        raise ConfigError(unknown_name("model family", name, families()))
    return importlib.import_module(f"{__name__}.{name}").FAMILY
