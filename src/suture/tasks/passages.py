"""The rows of a task of texts that a language model is scored on: columns of a table, or plain text files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suture.errors import DataError, data_refusal, shown
from suture.tasks.base import Split, Task, files_identity, filled
from suture.tasks.scoring import CHOICE_METRICS, EXACT_MATCH, Scoring
from suture.tasks.sources.tables import stored_rows

_PROMPT = "{text}"


@dataclass(frozen=True)
class Passage:
    """One row: the prompt or text, its choices if any, and the answer: a choice's number, or a text."""

    prompt: str
    choices: tuple[str, ...] = ()
    answer: int | str | None = None


@dataclass(frozen=True)
class Passages(Sequence[Passage]):
    """The rows of one split, in a fixed order; `identity` changes when the files do."""

    rows: tuple[Passage, ...]
    identity: str | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def first(self, count: int) -> "Passages":
        """The first rows only."""
        return Passages(self.rows[:count])


def read_passages(folder: Path, split: Split, task: Task) -> Passages:
    """The rows of a split of a folder; raises `DataError` for a missing column, an empty text or an impossible answer.

    A folder holds a table (jsonl, csv, tsv, parquet, or what `datasets` saved), or plain texts: `test.txt`, or `test/`
    with a file for each text.
    """
    scoring = task.score
    assert scoring is not None
    files = _plain_files(folder, split)
    if files is not None:
        rows = [{"text": _text_of(file)} for file in files]
        identity = files_identity(files)
    else:
        rows, identity = stored_rows(folder, split, task, _columns(task, scoring))
    if not rows:
        raise data_refusal(folder, f"has no rows in its {split} split", "put some there")
    passages = tuple(_passage(number, row, task, scoring, folder) for number, row in enumerate(rows))
    return Passages(passages, identity)


def _plain_files(folder: Path, split: Split) -> list[Path] | None:
    single, several = folder / f"{split}.txt", folder / split
    if single.is_file():
        return [single]
    files = sorted(several.glob("*.txt")) if several.is_dir() else []
    return files or None


def _text_of(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise data_refusal(file, f"cannot be read ({error})", "save it as text in UTF-8") from error


def _columns(task: Task, scoring: Scoring) -> tuple[str, ...]:
    """The columns that a task reads: those of its prompt, its choices and its answer."""
    answer = (answer_column(task),) if scoring.metric in (*CHOICE_METRICS, EXACT_MATCH) else ()
    choices = (scoring.choices_column,) if scoring.choices_column else ()
    return tuple(dict.fromkeys((*(task.text_columns or ("text",)), *choices, *answer)))


def answer_column(task: Task) -> str:
    """The column with the answers, by default `answer`."""
    return task.label_column or "answer"


def _passage(number: int, row: Mapping[str, Any], task: Task, scoring: Scoring, folder: Path) -> Passage:
    where = f"row {number} of '{folder}'"
    texts = {name: row[name] for name in task.text_columns or ("text",)}
    for name, text in texts.items():
        if not isinstance(text, str):
            found = f"{where} has no text in column '{name}' but a {type(text).__name__}"
            raise DataError(f"{found}. Remedy: fill or remove it.")
    default = "{" + next(iter(texts)) + "}"
    prompt = filled(task.templates[0] if task.templates else default, texts)
    if scoring.metric in CHOICE_METRICS:
        choices = _choices(row, task, scoring, where)
        return Passage(prompt, choices, _right(row[answer_column(task)], choices, where))
    if scoring.metric == EXACT_MATCH:
        answer = row[answer_column(task)]
        return Passage(prompt, (), answer if isinstance(answer, str) else str(answer))
    if not prompt.encode():
        raise DataError(f"{where} is empty; wanted a text. Remedy: fill or remove it.")
    return Passage(prompt)


def _choices(row: Mapping[str, Any], task: Task, scoring: Scoring, where: str) -> tuple[str, ...]:
    choices = row[scoring.choices_column] if scoring.choices_column else task.classnames
    if isinstance(choices, Mapping):  # as in ARC: {"text": […], "label": […]}
        choices = choices.get("text")
    if not isinstance(choices, list | tuple) or len(choices) < 2 or not all(isinstance(c, str) for c in choices):
        raise DataError(f"{where} has the choices {shown(choices)!r}; wanted a list of two texts or more.")
    if empty := [number for number, choice in enumerate(choices) if not choice.strip()]:
        raise DataError(f"{where}: choice {empty[0]} is empty, so it has no token. Remedy: fill or remove it.")
    return tuple(choices)


def _right(answer: Any, choices: Sequence[str], where: str) -> int:
    """The number of the right choice, given as such, as its letter, or as the choice itself."""
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    if isinstance(answer, str) and answer.strip().isdecimal():
        answer = int(answer)
    if isinstance(answer, str) and len(answer.strip()) == 1:
        answer = ord(answer.strip().upper()) - ord("A")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise DataError(
            f"{where} has the answer {shown(answer)!r}; wanted the number of one of {len(choices)} choices."
        )
    return answer
