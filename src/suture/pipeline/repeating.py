"""Repeating a run from inside its folder: its pools as YAML files, and the command that uses them."""

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from suture.pipeline import config as configuration

_POOLS = ("modelpool", "taskpool")
_AGAIN = "again"  # the folder of the repeated run, inside that of the first
_NAMES = ("method", "repair", "surgery", "models")  # keys whose values are names, even where a file has the same name
_FILES_OF_A_TASK = ("source", "root", "classnames")


def write_pools(config: Mapping[str, Any], folder: Path, final: Path) -> str:
    """Write the run's pools into `folder`, and return the command that repeats the run from inside `final`.

    The pools are those of the composed configuration, with local paths made absolute, so that the folder can be moved
    on this machine. Local paths in the command are relative to `final`, where `folder` will lie. A command that names
    no pool, such as `suture demo`, is returned as it is, and nothing is written.
    """
    command = config.get("command", "")
    words = shlex.split(command)
    if not any(word.startswith("modelpool=") for word in words):
        return command
    given = [group for group in _POOLS if config.get(group)]
    resolved = {"modelpool": _model_pool, "taskpool": _task_pool}
    for group in given:
        configuration.save(resolved[group](config[group]), folder / f"{group}.yaml")
    return shlex.join([*_kept(words, final), *(f"{group}={group}.yaml" for group in given), f"output={_AGAIN}"])


def _kept(words: Sequence[str], final: Path) -> list[str]:
    """The words of a command without its pools, its output, and what says how to treat an earlier result."""
    kept = []
    for word in words:
        key, equals, value = word.partition("=")
        group = key.lstrip("+~").split(".")[0]
        if group in (*_POOLS, "output", "overwrite", "reuse", "dry_run") and (equals or key.startswith("~")):
            continue
        looks_local = "/" in value or Path(value).suffix
        if equals and looks_local and group not in _NAMES and Path(value).expanduser().exists():
            word = f"{key}={os.path.relpath(Path(value).expanduser().absolute(), final.absolute())}"
        kept.append(word)
    return kept


def _model_pool(pool: Mapping[str, Any]) -> dict[str, Any]:
    """The pool with absolute paths: those of the models, and of the family's own files."""
    root = pool.get("root")
    absolute: dict[str, Any] = {}
    for key, value in pool.items():
        if isinstance(value, Mapping):
            absolute[key] = {name: _absolute(path) if root is None else path for name, path in value.items()}
        else:
            absolute[key] = value if key == "family" else _absolute(value)
    return absolute


def _task_pool(pool: Mapping[str, Any]) -> dict[str, Any]:
    """The pool with absolute paths: those of the data, and of files of class names."""
    tasks = {
        name: {key: _absolute(value) if key in _FILES_OF_A_TASK else value for key, value in (task or {}).items()}
        for name, task in (pool.get("tasks") or {}).items()
    }
    absolute = {key: _absolute(value) if key == "root" else value for key, value in pool.items()}
    return {**absolute, "tasks": tasks}


def _absolute(value: Any) -> Any:
    """The absolute path of a text that names something local; anything else as it is."""
    if not isinstance(value, str) or not value or "\n" in value:
        return value
    try:
        path = Path(value).expanduser()
        return str(path.absolute()) if path.exists() else value
    except (OSError, RuntimeError, ValueError):  # a name that is too long, or a home that is not known
        return value
