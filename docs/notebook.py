"""The tutorial as a notebook: python docs/notebook.py writes examples/tutorial.ipynb from docs/tutorial.md."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE, NOTEBOOK = ROOT / "docs" / "tutorial.md", ROOT / "examples" / "tutorial.ipynb"
_CODE = re.compile(r"```python\n(.*?)```\n?|((?:^    suture [^\n]*\n)+)", re.S | re.M)
_LINK = re.compile(r"\]\((\w+)\.md\)")


def notebook(text: str) -> dict[str, Any]:
    """A notebook without outputs: a cell for each block of Python or of commands, and for the text between them."""
    about = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return {"cells": list(_cells(text)), "metadata": about, "nbformat": 4, "nbformat_minor": 5}


def _cells(text: str) -> Iterator[dict[str, Any]]:
    at = number = 0
    for block in [*_CODE.finditer(text), None]:
        prose = text[at : block.start() if block else None].strip()
        if prose:
            yield _cell("markdown", _LINK.sub(r"](../docs/\1.md)", prose), number)
            number += 1
        if block:
            at = block.end()
            python, commands = block.groups()
            yield _cell("code", python or re.sub(r"^    ", "!", commands, flags=re.M), number)
            number += 1


def _cell(kind: str, source: str, number: int) -> dict[str, Any]:
    more = {"execution_count": None, "outputs": []} if kind == "code" else {}
    lines = source.strip().splitlines(keepends=True)
    return {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": lines, **more}


if __name__ == "__main__":
    NOTEBOOK.write_text(json.dumps(notebook(PAGE.read_text("utf-8")), indent=1, ensure_ascii=False) + "\n", "utf-8")
