"""Models whose vocabularies differ: the rows of embeddings and heads that belong together, by a named choice.

    base    the base's rows: a model's further rows are left out, rows that a model lacks stay at the base
    crop    the rows that all have
    pad     as many rows as the largest has
    union   the base's tokens, then those that only models have; rows go by their token, whatever its number

A row that a model lacks is the base's, so that the model has no say in it. A row that the base lacks is the mean of
those of the models that have it, so that what one model alone knows comes out as it is.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from suture.checkpoints import Checkpoint
from suture.checkpoints.checkpoint import Entry
from suture.errors import CheckpointError, refusal
from suture.merging.compatibility import VOCABULARY, spec_of

RowMap = np.ndarray  # (target row,) the row of a model, −1 where it has none


class Fitted(NamedTuple):
    """Base and models with as many rows each, and what changes in the configuration and in the tokenizer's text."""

    base: Checkpoint
    models: Mapping[str, Checkpoint]
    config: Mapping[str, Any]
    tokenizer: str | None = None


def fit(base: Checkpoint, models: Mapping[str, Checkpoint], choice: str) -> Fitted:
    """Make the vocabularies equal by one of the choices; raises `CheckpointError` if `union` finds no tokenizer."""
    names = vocabulary_tensors(base, models, differing=choice != "union")
    if choice == "refuse" or not names:
        return Fitted(base, models, {})
    counts = [spec_of(c, names[0]).shape[0] for c in (base, *models.values())]
    if choice == "union":
        maps, text = _by_token(base, models, counts)
    else:
        target = {"base": counts[0], "crop": min(counts), "pad": max(counts)}[choice]
        maps, text = [_first(count, target) for count in counts], None
    tables = {name: _Table(name, base, list(models.values()), maps) for name in names}
    fitted = [
        checkpoint.replaced({name: table.entry(i, checkpoint) for name, table in tables.items() if name in checkpoint})
        for i, checkpoint in enumerate((base, *models.values()))
    ]
    return Fitted(fitted[0], dict(zip(models, fitted[1:], strict=True)), {"vocab_size": len(maps[0])}, text)


def vocabulary_tensors(base: Checkpoint, models: Mapping[str, Checkpoint], *, differing: bool) -> list[str]:
    """Embeddings and heads; with `differing` only if some model has another number of rows."""
    names = [
        name
        for name, spec in base.specs.items()
        if name not in base.aliases
        and len(spec.shape) >= 1
        and spec.dtype.is_floating_point
        and "position" not in name
        and any(part in name for part in VOCABULARY)
        and all(name in m and spec_of(m, name).shape[1:] == spec.shape[1:] for m in models.values())
    ]
    rows = {spec_of(c, name).shape[0] for name in names for c in (base, *models.values())}
    return names if len(rows) > 1 or not differing else []


class _Table:
    """One embedding or head in all models: what fills a row that one of them lacks."""

    def __init__(self, name: str, base: Checkpoint, models: Sequence[Checkpoint], maps: Sequence[RowMap]):
        self.name = name
        self.all = [base, *models]
        self.maps = maps
        spec = base.specs[name]
        self.shape = (len(maps[0]), *spec.shape[1:])
        self.width = int(np.prod(spec.shape[1:], dtype=np.int64))

    def entry(self, i: int, checkpoint: Checkpoint) -> Entry:
        """The tensor of the i-th model with the rows of all."""
        spec = spec_of(checkpoint, self.name)._replace(shape=self.shape)
        part = lambda start, stop: self.part(i, start, stop)
        return Entry(spec, lambda: part(0, spec.numel).view(self.shape), part=part)

    def part(self, i: int, start: int, stop: int) -> Tensor:
        """Entries start … stop of the i-th model's tensor."""
        first, last = start // self.width, -(-stop // self.width)
        dtype = spec_of(self.all[i], self.name).dtype
        runs = [self._run(i, a, b).to(dtype) for a, b in _runs(self.maps[i][first:last], first)]
        rows = torch.cat(runs) if runs else torch.empty(0, dtype=dtype)
        return rows[start - first * self.width : stop - first * self.width]

    def _run(self, i: int, first: int, last: int) -> Tensor:
        """Rows first … last, which follow one another in the i-th model, or all of which it lacks."""
        row = int(self.maps[i][first])
        if row >= 0:
            return self.all[i].flat(self.name)[row * self.width : (row + last - first) * self.width]
        if i > 0:
            return self.part(0, first * self.width, last * self.width)
        return torch.cat([self._mean(target) for target in range(first, last)])

    def _mean(self, target: int) -> Tensor:
        """A row that the base lacks: the mean of the models' that have it."""
        having = [
            (c, int(rows[target])) for c, rows in zip(self.all[1:], self.maps[1:], strict=True) if rows[target] >= 0
        ]
        rows = [c.flat(self.name)[row * self.width : (row + 1) * self.width].double() for c, row in having]
        return torch.stack(rows).mean(0) if rows else torch.zeros(self.width, dtype=torch.float64)


def _runs(rows: RowMap, offset: int) -> Iterator[tuple[int, int]]:
    """Runs of rows that follow one another, or are all lacking."""
    if not len(rows):
        return
    steps = np.diff(rows)
    together = np.where(rows[1:] < 0, (rows[:-1] < 0) & (steps == 0), steps == 1) & ((rows[:-1] < 0) == (rows[1:] < 0))
    ends = [0, *(np.flatnonzero(~together) + 1).tolist(), len(rows)]
    for start, stop in pairwise(ends):
        yield start + offset, stop + offset


def _first(count: int, target: int) -> RowMap:
    rows = np.arange(target)
    return np.where(rows < count, rows, -1)


def _by_token(
    base: Checkpoint, models: Mapping[str, Checkpoint], counts: Sequence[int]
) -> tuple[list[RowMap], str | None]:
    """Each model's row of every token, and the base's tokenizer with the tokens that only models have."""
    base_rows = counts[0]
    own = _tokens(base, base_rows)
    known = [
        own if model.directory is None else _tokens(model, rows)
        for model, rows in zip(models.values(), counts[1:], strict=True)
    ]
    ids = dict(own)
    following = max(ids.values(), default=-1) + 1
    for tokens in known:
        for token in sorted(tokens.keys() - ids.keys(), key=tokens.__getitem__):
            ids[token] = following
            following += 1
    target = max(base_rows, following)
    maps = [np.full(target, -1) for _ in (base, *known)]
    maps[0][:base_rows] = np.arange(base_rows)
    added = [token for token in ids if token not in own]
    maps[0][[ids[token] for token in added]] = -1
    for rows, tokens in zip(maps[1:], known, strict=True):
        for token, row in tokens.items():
            rows[ids[token]] = row
    return maps, _with_tokens(base, added, ids) if added else None


def _tokens(checkpoint: Checkpoint, rows: int) -> dict[str, int]:
    """Token → row of a model with so many rows; raises `CheckpointError` for a file that holds something else."""
    tokenizer = _tokenizer(checkpoint)
    try:
        vocabulary = tokenizer.get("model", {}).get("vocab", {})
        if isinstance(vocabulary, list):  # Unigram: pairs of token and score
            vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
        tokens = {**vocabulary, **{token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise _no_tokenizer(checkpoint) from None
    if not all(isinstance(token, str) and type(row) is int and row >= 0 for token, row in tokens.items()):
        raise _no_tokenizer(checkpoint)
    if tokens and max(tokens.values()) >= rows:
        problem = f"has a tokenizer.json for {max(tokens.values()) + 1} rows, and weights of {rows}"
        raise refusal(checkpoint.label, problem, "put the tokenizer of these weights beside them")
    return tokens


def _tokenizer(checkpoint: Checkpoint) -> dict[str, Any]:
    path = (checkpoint.directory or Path()) / "tokenizer.json"
    try:
        if checkpoint.directory is None:
            raise FileNotFoundError
        tokenizer = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        raise _no_tokenizer(checkpoint) from None
    if not isinstance(tokenizer, dict):
        raise _no_tokenizer(checkpoint)
    return tokenizer


def _no_tokenizer(checkpoint: Checkpoint) -> CheckpointError:
    problem = "has no tokenizer.json that can be read, so its rows have no tokens"
    return refusal(checkpoint.label, problem, "put it beside the weights, or choose vocabulary=base, crop or pad")


def _with_tokens(base: Checkpoint, added: Sequence[str], ids: Mapping[str, int]) -> str:
    tokenizer = _tokenizer(base)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    tokenizer["added_tokens"] = [
        *tokenizer.get("added_tokens", []),
        *({"id": ids[token], "content": token, **plain} for token in added),
    ]
    return json.dumps(tokenizer, ensure_ascii=False, indent=2)
