"""Rows of a task to requests and to token ids, with the tokenizer of a language model."""

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from suture.core.random import generator_for
from suture.errors import ConfigError, DataError
from suture.families.shared.requests import Choice, Requests, Window
from suture.families.shared.texts import load_tokenizer, model_length, padded
from suture.tasks import Passage, Task
from suture.tasks.scoring import CHOICE_METRICS, EXACT_MATCH


class PromptReader:
    """A tokenizer with the rules of lm-evaluation-harness.

    A prompt and its continuation are tokenized together; the tokens after those of the prompt alone are the
    continuation's. Spaces at a prompt's end count as its continuation's. Texts begin after the token of a beginning, or
    of an end where there is none, and texts longer than the context are cut into windows that all but the last do not
    overlap.
    """

    def __init__(self, directory: Path, settings: Any, positions: int | None):
        self.label = str(directory)
        self.tokenizer = load_tokenizer(directory, end_pads=True)
        self.max_length = model_length(settings.get("max_length"), self.tokenizer, positions)
        tokenizer = self.tokenizer
        self.start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if self.start is None:
            raise ConfigError(f"The tokenizer of '{directory}' has neither a bos_token nor an eos_token to begin with.")

    @cached_property
    def preprocessing(self) -> str:
        """Everything that determines the tokens beside the text, as JSON."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        tokenizer = backend.to_str() if backend is not None else self.tokenizer.get_vocab()
        libraries = {name: version(name) for name in ("tokenizers", "transformers")}
        return json.dumps([tokenizer, self.tokenizer.chat_template, self.max_length, libraries], sort_keys=True)

    def requests(self, task: Task, rows: Sequence[Passage]) -> Requests:
        """The requests of these rows; raises `DataError` for what does not fit the context or has no token."""
        scoring = task.score
        assert scoring is not None
        shared = {"pad": self.tokenizer.pad_token_id, "decode": self._decode}
        if scoring.metric in CHOICE_METRICS:
            choices = [choice for number, row in enumerate(rows) for choice in self._choices(task, number, row)]
            answers = [row.answer for row in rows if row.answer is not None]
            return Requests(scoring, choices=choices, answers=answers, **shared)
        if scoring.metric == EXACT_MATCH:
            prompts = [self._generated_prompt(task, number, row) for number, row in enumerate(rows)]
            return Requests(scoring, prompts=prompts, answers=[str(r.answer) for r in rows], end=self._end, **shared)
        windows = [window for number, row in enumerate(rows) for window in self._windows(task, number, row.prompt)]
        counts = {"bytes": [len(r.prompt.encode()) for r in rows], "words": [len(r.prompt.split()) for r in rows]}
        return Requests(scoring, windows=windows, **counts, **shared)

    def unlabelled(self, task: Task, rows: Sequence[Passage], name: str) -> dict[str, Tensor]:
        """Prompts to learn the next token on: input_ids and attention_mask, int32 (N, length).

        Texts that are scored whole end at a drawn place, from a quarter of what fits the context on.
        """
        generator, tokens = generator_for(0, f"{name}/ends"), []
        for row in rows:
            if task.score is not None and task.score.metric in (*CHOICE_METRICS, EXACT_MATCH):
                ids = self._prompt(task, row.prompt)[-self.max_length :] or [self.start]
            else:
                ids = [self.start, *self._encode(row.prompt)][: self.max_length]
                least = max(1, len(ids) // 4)
                ids = ids[: int(torch.randint(least, len(ids) + 1, (1,), generator=generator))]
            tokens.append(list(ids))
        length, pad = max(map(len, tokens), default=1), self.tokenizer.pad_token_id
        mask = padded([[1] * len(ids) for ids in tokens], length, 0)
        return {"input_ids": padded(tokens, length, pad), "attention_mask": mask}

    def prompt_text(self, task: Task, prompt: str) -> str:
        """A prompt, in the tokenizer's chat template if the task says so."""
        if task.score is None or not task.score.chat_template:
            return prompt
        if not self.tokenizer.chat_template:
            problem = (
                f"Task {task.name!r}: score.chat_template=true, but the tokenizer of '{self.label}' has no template"
            )
            raise ConfigError(f"{problem}. Remedy: leave it out, or give a pretrained model with chat_template.jinja.")
        message = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)

    def _encode(self, text: str) -> list[int]:
        starts = bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)
        return self.tokenizer.encode(text, add_special_tokens=not starts, verbose=False)

    def _prompt(self, task: Task, text: str) -> list[int]:
        return self._encode(self.prompt_text(task, text))

    def _decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    @property
    def _end(self) -> frozenset[int]:
        end = self.tokenizer.eos_token_id
        return frozenset() if end is None else frozenset([end])

    def _choices(self, task: Task, number: int, row: Passage) -> Iterator[Choice]:
        assert task.score is not None
        text = self.prompt_text(task, row.prompt)
        delimiter = "" if task.score.chat_template else task.score.delimiter
        for choice in row.choices:
            prompt, continuation = self._pair(text, delimiter + choice)
            if not continuation:
                problem = f"Task {task.name!r}: the choice {choice!r} of row {number} has no token after its prompt"
                raise DataError(f"{problem}. Remedy: give another choice, or another delimiter.")
            if len(prompt) + len(continuation) - 1 > self.max_length:
                raise self._too_long(task, number, len(prompt) + len(continuation) - 1)
            yield Choice(number, tuple(prompt), tuple(continuation), len(choice.encode()), len(choice))

    def _pair(self, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
        spaces = len(prompt) - len(prompt.rstrip())
        if spaces:
            prompt, continuation = prompt[:-spaces], prompt[-spaces:] + continuation
        if not prompt:
            return [self.start], self.tokenizer.encode(continuation, add_special_tokens=False)
        begun = self._encode(prompt)
        whole = self._encode(prompt + continuation)
        return begun, whole[len(begun) :]

    def _generated_prompt(self, task: Task, number: int, row: Passage) -> tuple[int, ...]:
        assert task.score is not None
        prompt = self._prompt(task, row.prompt) or [self.start]
        if len(prompt) + task.score.longest_answer > self.max_length:
            raise self._too_long(task, number, len(prompt), f" and an answer of {task.score.longest_answer}")
        return tuple(prompt)

    def _too_long(self, task: Task, number: int, length: int, more: str = "") -> DataError:
        problem = f"Task {task.name!r}: row {number} has {length} tokens{more}, but the context has {self.max_length}"
        return DataError(f"{problem}. Remedy: shorten it, or raise modelpool.max_length if the model can take more.")

    def _windows(self, task: Task, number: int, text: str) -> Iterator[Window]:
        tokens, longest = self._encode(text), self.max_length
        if not tokens:
            raise DataError(f"Task {task.name!r}: row {number} has no token. Remedy: fill or remove it.")
        first = tokens[:longest]
        yield Window(number, (self.start, *first), len(first))
        done = len(first)
        while done < len(tokens):
            end = min(done + longest, len(tokens))
            yield Window(number, tuple(tokens[max(0, end - longest - 1) : end]), end - done)
            done = end
