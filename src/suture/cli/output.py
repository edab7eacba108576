"""The answer of a command: tables for people, one JSON document for programs, the bare result for scripts."""

import contextlib
import io
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from suture.cli.grammar import EVERYWHERE, Request
from suture.errors import ConfigError


@dataclass(frozen=True)
class Answer:
    """`data` is what `--json` prints, `brief` what `--quiet` prints, one result a line; `code` is the exit code."""

    data: Any
    brief: str = ""
    code: int = 0


class Manner(Enum):
    """The form of a command's output."""

    TABLES = "tables"
    QUIET = "--quiet"
    JSON = "--json"

    @classmethod
    def of(cls, request: Request) -> "Manner":
        """The manner that the command line asks for."""
        return next((manner for manner in (cls.JSON, cls.QUIET) if manner.value in request.everywhere), cls.TABLES)

    def check(self, request: Request) -> None:
        """Refuse two manners at once, and JSON or a bare result of a command that prints text."""
        if self is Manner.TABLES:
            return
        other = Manner.QUIET if self is Manner.JSON else Manner.JSON
        texts = [option.name for option in (*request.verb.options, *EVERYWHERE) if option.text]
        given = ["--verbose"] if self is Manner.QUIET and "--verbose" in request.everywhere else []
        given += [name for name in texts if name in request.everywhere or request.values.get(name)]
        given += [other.value] if other.value in request.everywhere else []
        given += [f"suture {request.verb.name}"] if request.verb.text and "--version" not in request.everywhere else []
        if given:
            raise ConfigError(f"{self.value} does not go with {given[0]}.")

    @contextlib.contextmanager
    def while_working(self) -> Iterator[None]:
        """Tables and notes go nowhere unless they were asked for; with `--quiet` no progress is shown either."""
        with contextlib.ExitStack() as stack:
            if self is not Manner.TABLES:
                stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            if self is Manner.QUIET:
                from suture.core import progress

                stack.enter_context(progress.silent())
            yield

    def tell(self, answer: Answer) -> None:
        """Print the answer as it was asked for."""
        if self is Manner.JSON:
            print(json.dumps(plain(answer.data), indent=2, ensure_ascii=False))
        elif self is Manner.QUIET and answer.brief:
            print(answer.brief)


@contextlib.contextmanager
def aloud() -> Iterator[None]:
    """Inside the block, what suture logs goes to standard error: what is read, and the seconds of every stage."""
    handler, logger = logging.StreamHandler(), logging.getLogger("suture")
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


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
