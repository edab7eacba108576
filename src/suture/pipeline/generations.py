"""Continuations of given prompts by base, experts and merge, side by side, for a reader of the page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from suture.errors import ConfigError, check_known
from suture.evaluation.language import LanguageScorer
from suture.families.shared.requests import Requests
from suture.pipeline.context import Context
from suture.pipeline.models import Models
from suture.pipeline.results import Outcome
from suture.tasks import Passage, Scoring, Task

_KEYS = ("prompts", "max_new_tokens", "chat_template")


@dataclass(frozen=True)
class Generation:
    """The keys `generate.*`: prompts, the longest continuation in tokens, and whether to use the chat template."""

    prompts: tuple[str, ...]
    max_new_tokens: int = 40
    chat_template: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None, family: str) -> "Generation | None":
        """Read `generate`; None without prompts. Raises `ConfigError` for what does not fit."""
        values = {key: value for key, value in (config or {}).items() if value is not None}
        check_known("key of generate", values, _KEYS)
        prompts = values.pop("prompts", None) or ()
        prompts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
        if not prompts:
            return None
        if family != "causal_lm":
            raise ConfigError(
                f"generate.prompts is given, but family={family} generates no text. Remedy: leave it out."
            )
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise ConfigError(f"generate.prompts={list(prompts)!r}: wanted texts. Remedy: put them in quotes.")
        return cls(prompts, **values)

    @property
    def task(self) -> Task:
        """The prompts as a task, so that they are read and checked as others are."""
        score = {"metric": "exact_match", "max_new_tokens": self.max_new_tokens, "chat_template": self.chat_template}
        return Task("generate", ".", score=Scoring.of("generate", score))

    def requests(self, models: Models) -> Requests:
        """The prompts as tokens; raises `SutureError` for one that does not fit."""
        reader: Any = models.family.reader
        return reader.requests(self.task, [Passage(prompt, (), "") for prompt in self.prompts])


def generations(
    generation: Generation | None, models: Models, outcomes: Sequence[Outcome], context: Context
) -> list[dict[str, Any]]:
    """For each prompt: {"prompt": …, "continuations": {model: text}}, greedily generated; none where none was asked."""
    if generation is None:
        return []
    requests, encoder = generation.requests(models), models.new_encoder(context.device.device)
    scorer = LanguageScorer(forward=context.device.call)
    states: dict[str, Any] = {"pretrained": models.base}
    states |= {f"expert {name}": expert for name, expert in models.experts.items()}
    states |= {outcome.label: outcome.merged.tensors for outcome in outcomes}
    texts = {name: scorer.score(encoder.load(state), requests).answers for name, state in states.items()}
    return [
        {"prompt": prompt, "continuations": {name: answers[number] for name, answers in texts.items()}}
        for number, prompt in enumerate(generation.prompts)
    ]
