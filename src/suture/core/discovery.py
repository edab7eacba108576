"""Modules that are found by themselves: what a file in a package declares needs no list elsewhere."""

import importlib
import pkgutil
from types import ModuleType


def import_all(package: str) -> list[ModuleType]:
    """Import every module of a package, so that what they declare registers itself; returns them, sorted by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(importlib.import_module(package).__path__))
    return [importlib.import_module(f"{package}.{name}") for name in names]
