"""What a command gives back beside what people see: JSON for programs, a few words for scripts."""

import contextlib
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from suture.core import progress


@dataclass(frozen=True)
class Answer:
    """`data` is what `--json` prints, `brief` what `--quiet` prints, one result a line; `code` is the exit code."""

    data: Any
    brief: str = ""
    code: int = 0


class Manner(Enum):
    """How a command answers."""

    TABLES = "tables"
    QUIET = "--quiet"
    JSON = "--json"

    @contextlib.contextmanager
    def while_working(self) -> Iterator[None]:
        """Tables and notes go nowhere unless they were asked for; with `--quiet` no progress is shown either."""
        with contextlib.ExitStack() as stack:
            if self is not Manner.TABLES:
                stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            if self is Manner.QUIET:
                stack.enter_context(progress.silent())
            yield

    def tell(self, answer: Answer) -> None:
        """Print the answer as it was asked for."""
        if self is Manner.JSON:
            print(json.dumps(plain(answer.data), indent=2, ensure_ascii=False))
        elif self is Manner.QUIET and answer.brief:
            print(answer.brief)


def plain(data: Any) -> Any:
    """As JSON can hold it: what is not finite is null, what is no number or text its text.

    >>> plain({"mean": float("nan"), "shape": (2, 3)})
    {'mean': None, 'shape': [2, 3]}
    """
    if isinstance(data, Mapping):
        return {str(key): plain(value) for key, value in data.items()}
    if isinstance(data, Sequence) and not isinstance(data, str):
        return [plain(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return None
    return data if data is None or isinstance(data, bool | int | float | str) else str(data)
