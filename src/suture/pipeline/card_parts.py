"""The parts of suture's model cards: front matter for hubs, the table of merged files, and the command."""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from suture.storage.hub import is_hub_id


def front_matter(sources: Sequence[Any], tags: Sequence[str], library: str, datasets: Sequence[str] = ()) -> list[str]:
    """The YAML at the start of a card. `sources` that are not hub ids are left out, because their names lead nowhere.

    >>> front_matter(["org/base@v1", "runs/mine.pt"], ["ties_merging"], "transformers")[1:3]
    ['base_model: ["org/base"]', 'base_model_relation: merge']
    """
    models = [source.partition("@")[0] for source in sources if isinstance(source, str) and is_hub_id(source)]
    lines = [f"base_model: {json.dumps(models)}", "base_model_relation: merge"] if models else []
    lines += [f"library_name: {library}", f"tags: {json.dumps(['merge', 'suture', *tags])}"]
    lines += [f"datasets: {json.dumps(list(dict.fromkeys(datasets)))}"] if datasets else []
    return ["---", *lines, "---"]


def inputs_table(sources: Mapping[str, Any], provenance: Mapping[str, Any]) -> list[str]:
    """A row for each file that was read; `provenance`: model → its files and their hashes."""
    rows = (row for label, source in sources.items() for row in _rows(label, source, provenance[label]))
    return ["| model | files | sha256 |", "|---|---|---|", *rows]


def command_line(command: str) -> str:
    """The command as a block of code, with only the last part of absolute paths on this machine.

    >>> command_line("suture base=/home/me/llama output=out")
    '    suture base=llama output=out'
    """
    try:
        arguments = [argument.partition("=") for argument in shlex.split(command)]
    except ValueError:
        return f"    {command}"
    return "    " + shlex.join(
        f"{key}{equals}{_shortened(value)}" if equals else _shortened(key) for key, equals, value in arguments
    )


def _shortened(text: str) -> str:
    return Path(text).name if text.startswith(("/", "~")) else text


def _rows(label: str, source: Any, provenance: Mapping[str, Any]) -> Iterator[str]:
    name = source if isinstance(source, str) and is_hub_id(source) else label.strip("_")
    for path, digest in provenance.get("files", {"in memory": provenance.get("sha256")}).items():
        yield f"| {name} | {Path(path).name} | {digest} |"
