"""Tokens of vocabulary rows, from tokenizer.json: rows that stand for different tokens must not be mixed."""

import filecmp
import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from suture.checkpoints.checkpoint import Checkpoint
from suture.checkpoints.json_files import read_object
from suture.errors import problem, refusal, shown

_AGAIN = "copy or download the tokenizer again"
_REMEDY = (
    "suture merge … vocabulary=union, which goes by token; vocabulary=base, crop or pad, which go by row; "
    "or merge models of one tokenizer"
)
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPARE = re.compile(r"reserved|unused|placeholder", re.IGNORECASE)  # tokens that a model may give a meaning of its own


def mixed_tokens(base: Checkpoint, models: Mapping[str, Checkpoint], rows: int) -> list[str]:
    """A line for each model some of whose first `rows` rows are tokens other than the base's, or an earlier model's.

    Models without a tokenizer.json are taken to have the base's. Raises `CheckpointError` for one that is damaged.
    """
    problems = []
    known: dict[int, tuple[str, str]] = {}
    files: list[Path] = []
    for label, model in {"the base": base, **models}.items():
        file = (model.directory or Path()) / "tokenizer.json"
        if model.directory is None or not file.is_file() or any(_same(file, other) for other in files):
            continue
        files.append(file)
        tokens = {row: token for row, token in token_rows(file).items() if row < rows}
        if different := sorted(row for row, token in tokens.items() if not _agree(known.get(row), token)):
            problems.append(_difference(label, different, tokens, known))
        known |= {row: (token, label) for row, token in tokens.items() if not _SPARE.search(token)}
    return problems


def token_rows(file: Path) -> dict[int, str]:
    """Row → token, of a tokenizer.json; raises `CheckpointError` for a file that holds something else."""
    content: Any = read_object(file, _AGAIN)
    try:
        vocabulary = content.get("model", {}).get("vocab", {})
        if isinstance(vocabulary, list):  # Unigram: pairs of token and score
            vocabulary = {token: row for row, (token, _) in enumerate(vocabulary)}
        tokens = {**vocabulary, **{token["content"]: token["id"] for token in content.get("added_tokens") or []}}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise refusal(file, f"is no tokenizer ({type(error).__name__}: {error})", _AGAIN) from error
    if not all(isinstance(token, str) and type(row) is int and row >= 0 for token, row in tokens.items()):
        raise refusal(file, "is no tokenizer: its vocabulary does not lead from text to rows", _AGAIN)
    return {row: token for token, row in tokens.items()}


def token_keys(file: Path) -> dict[int, str | bytes]:
    """Row → what a token stands for, whatever the kind of tokenizer: its bytes, or the text of an added token.

    A space is Ġ in byte-level BPE and ▁ in SentencePiece, which also writes single bytes as <0x0A>.
    """
    content: Any = read_object(file, _AGAIN)
    tokens = token_rows(file)
    added = {token["id"] for token in content.get("added_tokens") or []}
    parts = json.dumps([content.get("pre_tokenizer"), content.get("decoder"), content.get("normalizer")])
    spelled = _byte_level if '"ByteLevel"' in parts else _pieces if "\\u2581" in parts else str.encode
    return {row: token if row in added else spelled(token) for row, token in tokens.items()}


def _byte_level(token: str) -> bytes:
    """The bytes of a token of byte-level BPE, which writes each byte as one printable character."""
    table = _characters()
    if all(character in table for character in token):
        return bytes(table[character] for character in token)
    return token.encode("utf-8", "surrogatepass")


@cache
def _characters() -> dict[str, int]:
    """Character → byte: printable ones stand for themselves, the others follow from 256 on (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _pieces(token: str) -> bytes:
    """The bytes of a piece of SentencePiece."""
    if match := _BYTE.fullmatch(token):
        return bytes([int(match[1], 16)])
    return token.replace("\u2581", " ").encode("utf-8", "surrogatepass")


def _same(file: Path, other: Path) -> bool:
    return filecmp.cmp(file, other, shallow=False)


def _agree(known: tuple[str, str] | None, token: str) -> bool:
    return known is None or known[0] == token or bool(_SPARE.search(token))


def _difference(label: str, rows: list[int], tokens: Mapping[int, str], known: Mapping[int, tuple[str, str]]) -> str:
    token, of = known[rows[0]]
    more = f" (and {len(rows) - 1:,} more rows differ)" if len(rows) > 1 else ""
    found = f"has the token {shown(tokens[rows[0]])!r} in row {rows[0]}, where {of} has {shown(token)!r}{more}"
    return problem(label, found, _REMEDY)
