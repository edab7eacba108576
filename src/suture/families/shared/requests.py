"""Requests to a language model: texts, prompts with choices, or prompts to answer, as tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from suture.tasks.scoring import Scoring


@dataclass(frozen=True)
class Window:
    """Tokens, the last `predicted` of which are scored; `row` is the text that they are from."""

    row: int
    tokens: tuple[int, ...]
    predicted: int


@dataclass(frozen=True)
class Choice:
    """A prompt, a continuation of one token or more, its length in bytes and in characters."""

    row: int
    prompt: tuple[int, ...]
    continuation: tuple[int, ...]
    bytes: int
    characters: int


@dataclass(frozen=True)
class Requests:
    """The requests of one task, of one of three kinds; `answers` are choices' numbers or texts.

    `bytes` and `words` count those of each text.
    """

    scoring: Scoring
    windows: Sequence[Window] = ()
    bytes: Sequence[int] = ()
    words: Sequence[int] = ()
    choices: Sequence[Choice] = ()
    prompts: Sequence[tuple[int, ...]] = ()
    answers: Sequence[int | str] = ()
    end: frozenset[int] = frozenset()
    pad: int = 0
    decode: Callable[[Sequence[int]], str] | None = None

    def __len__(self) -> int:
        return len(self.bytes) or len(self.answers)
