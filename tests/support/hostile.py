"""Hostile inputs: values and bytes that readers must refuse, and the watch under which they are tried."""

import os
import random
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from suture.errors import SutureError

SECONDS = 20  # far more than any case takes
MEMORY = 4 << 30  # bytes of address space that a case may add
_REMEDIES = ("Remedy: ", "Known: ", "anted", "Did you mean")

#: Values of every JSON kind that someone once wrote where something else was wanted.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 5, 2**31, 2**63 - 1, 2**63, 2**64, 10**400, 0.7, -0.0, 1e308, float("nan")),
    *(
        "",
        "x",
        "0",
        "-1",
        "1e9",
        "F32",
        "..",
        "../../etc/passwd",
        "/etc/passwd",
        "a\0b",
        "a\nb",
        "\x1b[31mred",
        "\ud800",
    ),
    *(
        "z" * 5000,
        "§ü漢",
        "{}",
        "null",
        "(a+)+$",
        [],
        {},
        [[]],
        [None],
        {"": None},
        [10**400, 10**400],
        {"x": {"x": {}}},
    ),
    *([0, 2**63], [2**62, 4], [-1], [True], [1.5], ["1"], {"w": "x.safetensors"}, [0] * 100),
)


class Stuck(BaseException):
    """A case took longer than any reader should; no `except Exception` hides it."""


@contextmanager
def watched() -> Iterator[None]:
    """Bounded time and memory for what runs within."""

    def stuck(number: int, frame: object) -> None:
        raise Stuck(f"more than {SECONDS} s")

    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    earlier = signal.signal(signal.SIGALRM, stuck)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, earlier)


def tried(call: Callable[[], Any], folder: Path) -> str | None:
    """The one line with which a call is refused, or None where it went well; nothing may be left in the folder."""
    before = listing(folder)
    line = None
    with watched():
        try:
            call()
        except SutureError as error:
            line = str(error)
    if line is not None:
        assert_one_line(line)
        assert listing(folder) == before
    return line


def assert_one_line(line: str) -> None:
    """A message that a user can act on: one printable line of bounded length, with a remedy."""
    assert line.isprintable(), line
    assert any(remedy in line for remedy in _REMEDIES), line
    assert len(line) < 2500, line


def listing(folder: Path) -> dict[str, int]:
    """Every path below a folder with its size."""
    paths = [os.path.join(top, name) for top, folders, files in os.walk(folder) for name in (*folders, *files)]
    return {path: os.lstat(path).st_size for path in paths}


def value(random: random.Random) -> Any:
    """A hostile value."""
    return random.choice(VALUES)


def mutated(random: random.Random, content: Any) -> Any:
    """A JSON value with one part of it replaced, dropped, doubled or renamed."""
    if isinstance(content, dict) and content and random.random() < 0.9:
        key = random.choice(list(content))
        change = random.random()
        if change < 0.15:
            return {k: v for k, v in content.items() if k != key}
        if change < 0.3:
            name = random.choice([v for v in VALUES if isinstance(v, str)])
            return {(name if k == key else k): v for k, v in content.items()}
        if change < 0.4:
            return {**content, random.choice(["extra", "w", "", "__metadata__", "lora_bias"]): value(random)}
        return {**content, key: mutated(random, content[key])}
    if isinstance(content, list) and content and random.random() < 0.6:
        place = random.randrange(len(content))
        return [*content[:place], mutated(random, content[place]), *content[place + 1 :]]
    return value(random)


def damaged(random: random.Random, content: bytes) -> bytes:
    """Bytes with some of them changed, lost, doubled or cut off."""
    content = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 5))):
        place = random.randrange(max(1, len(content)))
        change = random.random()
        if change < 0.4:
            content[place : place + 1] = bytes([random.randrange(256)])
        elif change < 0.55:
            del content[place : place + random.choice((1, 2, 8, 100))]
        elif change < 0.7:
            content[place:place] = content[place : place + random.choice((1, 8, 64))]
        elif change < 0.85:
            content[place:place] = random.choice((b"\xff" * 8, b"\0" * 8, b"\x7f\xff\xff\xff", b"9" * 5000))
        else:
            del content[place:]
    return bytes(content)


def cases(few: int, many: int) -> list:
    """Numbers of cases to be generated: a few in every run of the suite, many more among the slow tests."""
    return [*range(few), *(pytest.param(number, marks=pytest.mark.slow) for number in range(few, many))]
