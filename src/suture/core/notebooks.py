"""Results in a notebook: tables as HTML and as pandas frames."""

import sys
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from suture.errors import ConfigError

if TYPE_CHECKING:
    from pandas import DataFrame


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    shell = sys.modules.get("IPython")
    running = shell.get_ipython() if shell is not None else None
    return running is not None and "ZMQ" in type(running).__name__


def table_html(heads: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> str:
    """A table as HTML; every text in it is escaped."""
    head = "".join(f"<th>{escape(str(name))}</th>" for name in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(_shown(cell))}</td>' for cell in row)}</tr>" for row in rows)
    caption = f"<caption>{escape(title)}</caption>" if title else ""
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def frame(heads: Sequence[str], rows: Sequence[Sequence[Any]], index: str | None = None) -> "DataFrame":
    """A table as a pandas frame, with one column as its index; raises `ConfigError` without pandas."""
    try:
        from pandas import DataFrame
    except ImportError:
        raise ConfigError("to_pandas needs pandas. Remedy: pip install pandas.") from None
    table = DataFrame([list(row) for row in rows], columns=list(heads))
    return table if index is None else table.set_index(index)


def _shown(cell: Any) -> str:
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
