"""Python objects that a pool names: `package.module:name` or `path/to/file.py:name`. Loading one runs its code."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from suture.errors import ConfigError, one_line, shown


def named_object(address: Any, key: str) -> Any:
    """The object at an address; imports its module, which runs the code in it. Raises `ConfigError` if that fails."""
    place, _, name = address.rpartition(":") if isinstance(address, str) else ("", "", "")
    if not place or not name.isidentifier():
        wanted = "wanted package.module:function or path/to/file.py:function"
        raise ConfigError(f"{key}={shown(address)!r}: {wanted}.")
    try:
        module = _from_file(Path(place).expanduser()) if place.endswith(".py") else importlib.import_module(place)
    except ConfigError:
        raise
    except BaseException as error:  # the code is the caller's and may raise anything
        if isinstance(error, KeyboardInterrupt):
            raise
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ConfigError(f"{key}={shown(address)!r} cannot be imported ({reason}). Remedy: mend that code.") from error
    if not hasattr(module, name):
        raise ConfigError(f"{key}={shown(address)!r}: '{shown(place)}' has no {name!r}. Remedy: name what it defines.")
    return getattr(module, name)


def _from_file(path: Path) -> ModuleType:
    """A Python file as a module; like a script's, its folder is where it finds the files beside it."""
    if not path.is_file():
        raise ConfigError(f"'{shown(path)}' does not exist. Remedy: check the path, which starts from this folder.")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    name = f"_suture_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look themselves up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module
