"""What every model card of suture says: what hubs look for in front, the files that were merged, how to repeat it."""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from suture.storage.hub import is_hub_id


def front_matter(sources: Sequence[Any], tags: Sequence[str], library: str, datasets: Sequence[str] = ()) -> list[str]:
    """The YAML in front of a card. `sources` that are on no hub are left out: their names would lead nowhere.

    >>> front_matter(["org/base@v1", "runs/mine.pt"], ["ties_merging"], "transformers")[1:3]
    ['base_model: ["org/base"]', 'base_model_relation: merge']
    """
    models = [source.partition("@")[0] for source in sources if isinstance(source, str) and is_hub_id(source)]
    lines = [f"base_model: {json.dumps(models)}", "base_model_relation: merge"] if models else []
    lines += [f"library_name: {library}", f"tags: {json.dumps(['merge', 'suture', *tags])}"]
    lines += [f"datasets: {json.dumps(list(dict.fromkeys(datasets)))}"] if datasets else []
    return ["---", *lines, "---"]


def inputs_table(sources: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """A row for each file that was read; `found` is what `provenance` says of each model."""
    rows = (row for label, source in sources.items() for row in _rows(label, source, found[label]))
    return ["| model | files | sha256 |", "|---|---|---|", *rows]


def command_line(command: str) -> str:
    """The command as a block of code; of an absolute path on this machine only the last part is told.

    >>> command_line("suture base=/home/me/llama output=out")
    '    suture base=llama output=out'
    """
    try:
        words = [word.partition("=") for word in shlex.split(command)]
    except ValueError:
        return f"    {command}"
    shorter = lambda text: Path(text).name if text.startswith(("/", "~")) else text
    return "    " + shlex.join(
        f"{key}{equals}{shorter(value)}" if equals else shorter(key) for key, equals, value in words
    )


def _rows(label: str, source: Any, found: Mapping[str, Any]) -> Iterator[str]:
    name = source if isinstance(source, str) and is_hub_id(source) else label.strip("_")
    for path, digest in found.get("files", {"in memory": found.get("sha256")}).items():
        yield f"| {name} | {Path(path).name} | {digest} |"
