"""Scores of a language model on requests: batched, sorted by length, with a prompt shared by its choices run once."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from suture.core.batches import Forward, call, device_of, evaluation_mode
from suture.core.fabric import Team
from suture.core.progress import Track, untracked
from suture.core.sharding import Placed
from suture.errors import CheckpointError, ConfigError
from suture.families.shared.next_token import NextToken, output_layer
from suture.families.shared.requests import Choice, Requests, Window
from suture.tasks.scoring import CHOICE_METRICS, EXACT_MATCH

B = TypeVar("B")
R = TypeVar("R")
_ROWS = 512  # hidden states that are turned into logits at a time


class Estimate(NamedTuple):
    """A score and its standard error; nan for one that cannot be estimated."""

    value: float
    error: float


@dataclass(frozen=True)
class LanguageScore:
    """The scores of one model on one task by metric, the number of rows, and the generated answers, if any."""

    estimates: Mapping[str, Estimate]
    samples: int
    answers: Sequence[str] = field(default=(), repr=False)


@dataclass(frozen=True)
class LanguageScorer:
    """Scores language models in batches of at most `batch_tokens` tokens, padding included.

    `share_prompts` runs a prompt once for all of its choices, with a cache of keys and values: the same numbers up to
    rounding. It is left out for models that are not a `NextToken` or one with modules. The processes of a `team` share
    the batches, and all have the results. Where weights are split over them, prompts are not shared, and answers are
    generated alike in each, because all have to make the same passes.
    """

    batch_tokens: int = 8192
    track: Track = untracked
    forward: Forward = call
    share_prompts: bool = True
    team: Team = field(default_factory=Team)

    def score(self, model: Any, requests: Requests, name: str = "Evaluating") -> LanguageScore:
        """The scores of a model; raises `ConfigError` for a model without an output layer."""
        placed = self.team.placed(model)
        layer = output_layer(placed.module)
        if layer is None:
            kind = type(placed.module).__name__
            raise ConfigError(f"A {kind} has no output layer; wanted a model of family=causal_lm.")
        run = _Run(placed, layer, self, requests.pad)
        with self.team.scoring(), evaluation_mode(placed.module):
            if requests.scoring.metric in CHOICE_METRICS:
                return _choice_score(requests, run.choices(requests.choices, name))
            if requests.scoring.metric == EXACT_MATCH:
                return _match_score(requests, run.generated(requests, name))
            return _text_score(requests, run.windows(requests.windows, name))


class _Run:
    """One model on one task."""

    def __init__(self, placed: Placed, layer: Callable[[Tensor], Tensor], scorer: LanguageScorer, pad: int):
        self.placed, self.layer, self.scorer, self.pad = placed, layer, scorer, pad
        self.model: nn.Module = placed.module
        self.device = device_of(self.model)
        networks = [part for part in self.model.modules() if isinstance(part, NextToken)]
        self.caches = scorer.share_prompts and len(networks) == 1
        self.shares = self.caches and not scorer.team.sharded

    def windows(self, windows: Sequence[Window], name: str) -> list[float]:
        """The log-likelihood of the predicted tokens of every window."""
        pairs = [(w.tokens[: len(w.tokens) - w.predicted], w.tokens[len(w.tokens) - w.predicted :]) for w in windows]
        return self._continuations(pairs, name)

    def choices(self, choices: Sequence[Choice], name: str) -> list[float]:
        """The log-likelihood of every choice after its prompt."""
        pairs = [(choice.prompt, choice.continuation) for choice in choices]
        return self._shared(choices, name) if self.shares else self._continuations(pairs, name)

    def _continuations(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], name: str) -> list[float]:
        order = sorted(range(len(pairs)), key=lambda i: (-len(pairs[i][0]) - len(pairs[i][1]), i))
        batches = _batches(order, lambda i: len(pairs[i][0]) + len(pairs[i][1]), self.scorer.batch_tokens)

        def sums(batch: list[int]) -> list[float]:
            rows = [(*pairs[i][0], *pairs[i][1]) for i in batch]
            ids, mask = self._padded([row[:-1] for row in rows])
            counts = [len(pairs[i][1]) for i in batch]
            scored = torch.zeros(ids.shape, dtype=torch.bool)
            for row, (tokens, count) in enumerate(zip(rows, counts, strict=True)):
                scored[row, len(tokens) - 1 - count : len(tokens) - 1] = True
            targets = torch.tensor([token for i in batch for token in pairs[i][1]])
            features = self._features(input_ids=ids, attention_mask=mask, scored=scored)
            return self._sums(features, targets, counts)

        return self._each([0.0] * len(pairs), ((batch, batch) for batch in batches), sums, name)

    def _shared(self, choices: Sequence[Choice], name: str) -> list[float]:
        """The same, with each prompt run once; only the last token of a prompt is run with its choices."""
        numbers = range(len(choices))
        groups = [list(group) for _, group in groupby(numbers, key=lambda i: (choices[i].row, choices[i].prompt))]
        groups.sort(key=lambda group: -len(choices[group[0]].prompt))

        def cost(group: list[int]) -> int:
            return len(choices[group[0]].prompt) + sum(len(choices[i].continuation) for i in group)

        def values(batch: list[list[int]]) -> list[float]:
            return self._choice_batch([choices[group[0]].prompt for group in batch], batch, choices)

        batches = _batches(groups, cost, self.scorer.batch_tokens)
        numbered = ((batch, [i for group in batch for i in group]) for batch in batches)
        return self._each([0.0] * len(choices), numbered, values, name)

    def _each(
        self,
        results: list[R],
        batches: Iterable[tuple[B, list[int]]],
        function: Callable[[B], Sequence[R]],
        name: str,
        alike: bool = False,
    ) -> list[R]:
        """The `results`, with those of every batch at its numbers; processes share the batches.

        With `alike`, for a function whose passes differ in number, processes with parts of a model all run each batch.
        """
        batches, team = list(batches), self.scorer.team
        work = lambda batch: self.placed.run(partial(function, batch))
        found = (work(batch) for batch, _ in batches)
        if not (alike and team.sharded):
            found = team.each(work, (batch for batch, _ in batches), together=team.sharded)
        with self.scorer.track(name, len(results)) as advance:
            for (_, numbers), values in zip(batches, found, strict=True):
                for i, value in zip(numbers, values, strict=True):
                    results[i] = value
                advance(len(numbers))
        return results

    def _choice_batch(
        self, prompts: Sequence[Sequence[int]], groups: Sequence[list[int]], choices: Sequence[Choice]
    ) -> list[float]:
        flat = [i for group in groups for i in group]
        of = torch.tensor([number for number, group in enumerate(groups) for _ in group])
        cache, before = self._cached([prompt[:-1] for prompt in prompts], of)
        rows = [(choices[i].prompt[-1], *choices[i].continuation[:-1]) for i in flat]
        ids, mask = self._padded(rows)
        lengths = torch.tensor([len(prompts[int(number)]) - 1 for number in of])
        more: dict[str, Any] = {"position_ids": lengths[:, None] + torch.arange(ids.shape[1])}
        if cache is not None:
            more["past_key_values"] = cache
            full = torch.cat([before[of], mask], dim=1)
        else:
            full = mask
        features = self._features(input_ids=ids, attention_mask=full, scored=mask.bool(), **more)
        targets = torch.tensor([token for i in flat for token in choices[i].continuation])
        return self._sums(features, targets, [len(choices[i].continuation) for i in flat])

    def _cached(self, prompts: Sequence[Sequence[int]], of: Tensor) -> tuple[Any, Tensor]:
        """The keys and values of prompts, padded on the left, repeated for every choice, and the prompts' mask."""
        ids, mask = self._padded(prompts, left=True)
        if ids.shape[1] == 0:
            return None, mask
        cache = self._new_cache()
        self._features(input_ids=ids, attention_mask=mask, position_ids=_positions(mask), past_key_values=cache)
        cache.batch_select_indices(of.to(self.device))
        return cache, mask

    def generated(self, requests: Requests, name: str) -> list[str]:
        """The greedy continuation of every prompt, up to a stop text."""
        assert requests.decode is not None
        order = sorted(range(len(requests.prompts)), key=lambda i: (-len(requests.prompts[i]), i))
        longest = requests.scoring.longest_answer
        batches = _batches(order, lambda i: len(requests.prompts[i]) + longest, self.scorer.batch_tokens)
        answers = partial(self._answers, requests)
        return self._each([""] * len(order), ((batch, batch) for batch in batches), answers, name, alike=True)

    def _answers(self, requests: Requests, batch: Sequence[int]) -> list[str]:
        assert requests.decode is not None
        ids, mask = self._padded([requests.prompts[i] for i in batch], left=True)
        tokens: list[list[int]] = [[] for _ in batch]
        running, cache, whole = set(range(len(batch))), self._new_cache() if self.caches else None, ids
        positions = _positions(mask)
        for _ in range(requests.scoring.longest_answer):
            more = {} if cache is None else {"past_key_values": cache}
            features = self._features(input_ids=ids, attention_mask=mask, position_ids=positions, **more)
            chosen = self.layer(features.to(self.device)).argmax(-1).cpu()
            for row in list(running):
                token = int(chosen[row])
                if token in requests.end:
                    running.discard(row)
                    continue
                tokens[row].append(token)
                text = requests.decode(tokens[row])
                if any(stop in text for stop in requests.scoring.stop or ()):
                    running.discard(row)
            if not running:
                break
            mask = torch.cat([mask, torch.ones(len(batch), 1, dtype=mask.dtype)], dim=1)
            whole = torch.cat([whole, chosen[:, None].to(whole)], dim=1)
            ids, positions = (whole, _positions(mask)) if cache is None else (whole[:, -1:], _positions(mask)[:, -1:])
        return [requests.decode(each) for each in tokens]

    def _new_cache(self) -> Any:
        return next(part for part in self.model.modules() if isinstance(part, NextToken)).new_cache()

    def _features(self, **inputs: Any) -> Tensor:
        moved = {name: part.to(self.device) if isinstance(part, Tensor) else part for name, part in inputs.items()}
        return self.scorer.forward(self.model, moved)

    def _sums(self, features: Tensor, targets: Tensor, counts: Sequence[int]) -> list[float]:
        """Σ log p of the targets of every row, whose features stand one row after another."""
        parts = []
        for rows, right in zip(features.split(_ROWS), targets.to(features.device).split(_ROWS), strict=True):
            logits = self.layer(rows).float()
            parts.append(logits.log_softmax(-1).gather(1, right[:, None])[:, 0].double().cpu())
        values = torch.cat(parts)
        if not values.isfinite().all():
            raise CheckpointError("The model's log-likelihoods are not finite. Remedy: check its weights.")
        return [float(part.sum()) for part in values.split(list(counts))]

    def _padded(self, rows: Sequence[Sequence[int]], *, left: bool = False) -> tuple[Tensor, Tensor]:
        length = max(map(len, rows))
        ids = torch.full((len(rows), length), self.pad, dtype=torch.long)
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        for number, row in enumerate(rows):
            at = slice(length - len(row), length) if left else slice(0, len(row))
            ids[number, at] = torch.tensor(row, dtype=torch.long)
            mask[number, at] = 1
        return ids, mask


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


def _batches(items: Sequence[Any], length: Callable[[Any], int], tokens: int) -> Iterator[list[Any]]:
    """Neighbouring items whose padded length does not exceed so many tokens; one item at least."""
    batch: list[Any] = []
    longest = 0
    for item in items:
        longest_now = max(longest, length(item))
        if batch and longest_now * (len(batch) + 1) > tokens:
            yield batch
            batch, longest_now = [], length(item)
        batch.append(item)
        longest = longest_now
    if batch:
        yield batch


def _choice_score(requests: Requests, values: Sequence[float]) -> LanguageScore:
    """Whether the most likely choice is the right one: as it is, by byte, and by character; the first one wins ties."""
    by_row: dict[int, list[tuple[Choice, float]]] = {}
    for choice, value in zip(requests.choices, values, strict=True):
        by_row.setdefault(choice.row, []).append((choice, value))
    hits: dict[str, list[float]] = {"acc": [], "acc_norm": [], "acc_chars": []}
    for answer, row in zip(requests.answers, by_row.values(), strict=True):
        for metric, size in (("acc", None), ("acc_norm", "bytes"), ("acc_chars", "characters")):
            scores = [value / (getattr(choice, size) if size else 1) for choice, value in row]
            hits[metric].append(float(scores.index(max(scores)) == answer))
    return LanguageScore({name: _mean(each) for name, each in hits.items()}, len(requests))


def _match_score(requests: Requests, texts: Sequence[str]) -> LanguageScore:
    scoring = requests.scoring
    pairs = zip(texts, requests.answers, strict=True)
    hits = [float(scoring.extracted(text) == scoring.compared(str(answer))) for text, answer in pairs]
    return LanguageScore({EXACT_MATCH: _mean(hits)}, len(requests), tuple(texts))


def _text_score(requests: Requests, values: Sequence[float]) -> LanguageScore:
    """Ratios of sums over all texts, as the field reports them; errors by the delta method over texts."""
    rows = len(requests)
    losses, tokens = [0.0] * rows, [0] * rows
    for window, value in zip(requests.windows, values, strict=True):
        losses[window.row] -= value
        tokens[window.row] += window.predicted
    per_byte, per_token, per_word = (_ratio(losses, sizes) for sizes in (requests.bytes, tokens, requests.words))
    bits = Estimate(per_byte.value / math.log(2), per_byte.error / math.log(2))
    perplexities = {"perplexity": per_token, "byte_perplexity": per_byte, "word_perplexity": per_word}
    return LanguageScore({"bits_per_byte": bits} | {n: _exponential(e) for n, e in perplexities.items()}, rows)


def _mean(values: Sequence[float]) -> Estimate:
    """The mean, and the standard error √(Σ(x − mean)² / (n − 1) / n), as in lm-evaluation-harness."""
    count, mean = len(values), math.fsum(values) / len(values)
    if count < 2:
        return Estimate(mean, math.nan)
    return Estimate(mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count))


def _ratio(parts: Sequence[float], sizes: Sequence[int]) -> Estimate:
    """Σ parts / Σ sizes, and its standard error from the residuals of every row."""
    total, count = sum(sizes), len(parts)
    if not total:
        return Estimate(math.nan, math.nan)
    ratio = math.fsum(parts) / total
    if count < 2:
        return Estimate(ratio, math.nan)
    squares = math.fsum((part - ratio * size) ** 2 for part, size in zip(parts, sizes, strict=True))
    return Estimate(ratio, math.sqrt(count / (count - 1) * squares) / total)


def _exponential(estimate: Estimate) -> Estimate:
    if not estimate.value < 700:
        return Estimate(math.inf if estimate.value >= 700 else math.nan, math.nan)
    value = math.exp(estimate.value)
    return Estimate(value, value * estimate.error)
