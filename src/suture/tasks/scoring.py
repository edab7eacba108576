"""How texts are scored: perplexity, multiple choice by log-likelihood, or the exact match of a generated answer."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from suture.errors import ConfigError, check_known, shown

TextMetric = Literal["bits_per_byte", "perplexity", "word_perplexity"]
ChoiceMetric = Literal["acc", "acc_norm", "acc_chars"]
TEXT_METRICS: tuple[str, ...] = get_args(TextMetric)
CHOICE_METRICS: tuple[str, ...] = get_args(ChoiceMetric)
EXACT_MATCH = "exact_match"
SCORES = (*TEXT_METRICS, *CHOICE_METRICS, EXACT_MATCH)
_GENERATION = ("stop", "max_new_tokens", "pattern", "ignore_case")
_DEFAULT_TOKENS = 64


@dataclass(frozen=True)
class Scoring:
    """The score of a task of texts, and what it takes.

    - `metric`: bits_per_byte, perplexity or word_perplexity of a text; acc, acc_norm (log-likelihood divided by bytes)
      or acc_chars (by characters) of choices; or exact_match of a greedily generated answer.
    - `choices_column`: the column with each row's choices, unless the task's class names are the choices of all rows.
    - `delimiter` stands between a prompt and a choice.
    - `stop`: texts at which an answer ends. `pattern`: a regular expression whose first group, or whole match, is the
      answer; the last match counts. `max_new_tokens`: the longest answer, by default 64.
    - `chat_template`: put the prompt into the tokenizer's chat template, as a user's message.
    """

    metric: str
    choices_column: str | None = None
    delimiter: str = " "
    stop: tuple[str, ...] | None = None
    max_new_tokens: int | None = None
    pattern: str | None = None
    ignore_case: bool = False
    chat_template: bool = False

    @classmethod
    def of(cls, task: str, value: Any) -> "Scoring":
        """Read the key `score` of a task: a metric, or a mapping with its fields; raises `ConfigError`."""
        if isinstance(value, Scoring):
            return value
        values: Any = {"metric": value} if isinstance(value, str) else value
        where = f"Task {task!r}: score"
        if not isinstance(values, Mapping) or "metric" not in values:
            raise ConfigError(f"{where}={shown(value)!r}: wanted a metric, or a mapping with the key metric.")
        known = [field.name for field in fields(cls)]
        check_known(f"key of score of task {task!r}", values, known)
        check_known(f"metric of task {task!r}", [values["metric"]], SCORES)
        values = {key: each for key, each in values.items() if each is not None}
        stop = values.get("stop")
        if stop is not None:
            values["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
        scoring = cls(**values)
        scoring._refuse(where)
        return scoring

    def _refuse(self, where: str) -> None:
        given = [key for key in _GENERATION if getattr(self, key)]
        if self.metric != EXACT_MATCH and given:
            problem = f"{where}.{given[0]} belongs to exact_match, but metric={self.metric} generates nothing"
            raise ConfigError(f"{problem}. Remedy: leave it out.")
        if self.metric not in CHOICE_METRICS and self.choices_column:
            problem = f"{where}.choices_column belongs to multiple choice, but metric={self.metric}"
            raise ConfigError(f"{problem}. Remedy: leave it out.")
        if self.stop is not None and not all(isinstance(text, str) and text for text in self.stop):
            raise ConfigError(f"{where}.stop={list(self.stop)!r}: wanted texts that are not empty.")
        count = self.max_new_tokens
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
            raise ConfigError(f"{where}.max_new_tokens={count!r}: wanted a whole number, 1 or more.")
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise ConfigError(f"{where}.pattern={self.pattern!r} is not a regular expression: {error}.") from None

    @property
    def longest_answer(self) -> int:
        """The most tokens of a generated answer."""
        return self.max_new_tokens or _DEFAULT_TOKENS

    def extracted(self, text: str) -> str:
        """The answer in a generated text, cut at the first stop text, without spaces around it.

        >>> Scoring("exact_match", stop=("\\n",), pattern=r"(\\d+)").extracted(" 3 and 4.\\n5")
        '4'
        """
        for stop in self.stop or ():
            text = text.partition(stop)[0]
        if self.pattern:
            matches = list(re.finditer(self.pattern, text))
            if not matches:
                return ""
            text = matches[-1][1] if matches[-1].re.groups else matches[-1][0]
        return self.compared(text or "")

    def compared(self, text: str) -> str:
        """A text as it is compared with another."""
        return text.strip().lower() if self.ignore_case else text.strip()
