"""JSON files of unknown origin: configurations, tokenizers, indexes of shards."""

import json
import os
from pathlib import Path
from typing import Any, TypeGuard

from suture.errors import refusal

_LARGEST = 200_000_000  # bytes; the largest tokenizers have about 40 MB


def read_object(path: Path, remedy: str, *, largest: int = _LARGEST) -> dict[str, Any]:
    """The JSON object in a file; raises `CheckpointError` for anything else, and for more than `largest` bytes."""
    try:
        if not path.is_file():
            raise FileNotFoundError(2, "it is no regular file" if os.path.lexists(path) else "it does not exist")
        if path.stat().st_size > largest:
            raise refusal(path, f"has {path.stat().st_size} bytes, too many for what it should hold", remedy)
        content: Any = json.loads(path.read_bytes())
    except OSError as error:
        raise refusal(path, f"cannot be read: {error.strerror or error}", remedy) from error
    except (ValueError, RecursionError) as error:
        raise refusal(path, f"is not valid JSON ({type(error).__name__}: {error})", remedy) from error
    if not isinstance(content, dict):
        raise refusal(path, f"holds a JSON {_KINDS.get(type(content), 'value')}, not an object", remedy)
    return content


def model_config(directory: Path | None) -> dict[str, Any]:
    """The config.json of a model directory, empty where there is none; raises `CheckpointError` for a damaged one."""
    if directory is None or not ((path := directory / "config.json").exists() or path.is_symlink()):
        return {}
    return read_object(path, "copy or download the directory again")


def is_text(value: object) -> TypeGuard[str]:
    """Whether a value is text that can be written as UTF-8: JSON and pickles can spell half of a surrogate pair."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


_KINDS = {list: "array", str: "string", int: "number", float: "number", bool: "true or false", type(None): "null"}
