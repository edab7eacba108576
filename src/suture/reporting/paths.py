"""Absolute paths, which say more about a machine than about a run, shortened to their ends."""

import re
from collections.abc import Mapping
from typing import Any

_PARTS = 2  # of a path's end
_INSIDE = re.compile(r"""(?<![\w.:/\\~-])(?:file://)?(?:[A-Za-z]:)?(?:[/\\][^\s/\\'"<>|,;]+){2,}[/\\]?""")
_WHOLE = re.compile(r"(?:file://)?(?:[A-Za-z]:[/\\]|/)[^\n]+")


def without_machine(value: Any) -> Any:
    """The same text, or JSON data, with absolute paths shortened to the last two parts.

    >>> without_machine("taken up from /home/me/outputs/resume/3.pt.")
    'taken up from …/resume/3.pt.'
    >>> without_machine({"source": "/data/my pictures/cars"})
    {'source': '…/my pictures/cars'}
    """
    if isinstance(value, str):
        whole = _WHOLE.fullmatch(value) and " /" not in value
        return _end(value) if whole else _INSIDE.sub(lambda match: _end(match[0]), value)
    if isinstance(value, Mapping):
        return {without_machine(key): without_machine(each) for key, each in value.items()}
    return [without_machine(each) for each in value] if isinstance(value, list | tuple) else value


def _end(path: str) -> str:
    parts = [part for part in re.split(r"[/\\]", path.removeprefix("file://")) if part]
    return f"…/{'/'.join(parts[-_PARTS:])}"
