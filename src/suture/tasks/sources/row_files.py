"""Rows of text in csv, tsv and jsonl files, one file for each split: train.csv and test.csv. No library is needed.

Cells stay as they are written: a text of digits is a text, and so is "NA". A card, folders or other kinds of table
beside such files make the folder a data set of the `datasets` library.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch

from suture.errors import DataError, data_refusal, one_line, shown
from suture.tasks.base import Source, Split, Task, Texts, files_identity, unknown_column
from suture.tasks.class_names import numbered

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_SUFFIXES = (*_DELIMITERS, ".jsonl")
_SPLITS = {"train": "train", "test": "test"} | dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
_LARGEST = 500_000_000  # bytes that are held in memory; what is larger is mapped by the library
_CARD, _OTHER_TABLES = "README.md", (".parquet", ".arrow", ".tar")
_LONGEST_CELL = 2**31 - 1

Row = dict[str, Any]


def found(folder: Path) -> bool:
    """Whether a folder holds nothing but such files, one for each split."""
    return bool(_files(folder))


def rows_of(folder: Path, split: Split, task: Task, wanted: Sequence[str]) -> tuple[list[Row], str]:
    """The rows with the wanted columns, and their identity; raises `DataError` for a missing column."""
    file = _file(folder, split, task)
    rows = _read(file)
    if not rows:
        raise data_refusal(file, "has no rows", "put some there")
    names = dict.fromkeys(name for row in rows for name in row)
    for name in wanted:
        if name not in names:
            raise unknown_column(name, names, "`text_columns`, `label_column` or `score.choices_column`")
    return [{name: row.get(name) for name in wanted} for row in rows], files_identity([file])


def _load(folder: Path, split: Split, task: Task) -> Texts:
    texts, label = task.text_columns or (), task.label_column or "label"
    rows, identity = rows_of(folder, split, task, (*texts, label))
    labels = numbered(_numbers([row[label] for row in rows]), task.own_names, len(task.classnames), folder)
    columns = {name: [row[name] for row in rows] for name in texts}
    template = next(iter(task.templates), None)
    return Texts(
        columns, torch.tensor(labels, dtype=torch.int64), template, None, repr((identity, texts, label, template))
    )


def _numbers(labels: list[Any]) -> list[Any]:
    """Labels of which all are written as numbers, as numbers; others as they are."""
    try:
        return [float(label) if isinstance(label, str) else label for label in labels]
    except ValueError:
        return labels


def _problems(folder: Path, split: Split, task: Task) -> list[str]:
    try:
        if not task.text_columns:
            raise data_refusal(folder, "holds rows of text", "name the task's `text_columns`")
        texts = _load(folder, split, task)
        texts.rows(0, len(texts))
    except DataError as error:
        return [str(error)]
    return []


def _count(folder: Path, split: Split, task: Task) -> int | None:
    return len(_read(_file(folder, split, task)))


def _files(folder: Path) -> dict[str, Path]:
    """Split → file; empty where a folder holds something else too, or two files of a split."""
    files: dict[str, Path] = {}
    for path in folder.iterdir():
        if path.suffix in _SUFFIXES:
            split = _SPLITS.get(path.stem)
            if split is None or split in files or not path.is_file() or path.stat().st_size > _LARGEST:
                return {}
            files[split] = path
        elif path.is_dir() or path.name == _CARD or path.suffix in _OTHER_TABLES:
            return {}
    return files


def _file(folder: Path, split: Split, task: Task) -> Path:
    files = _files(folder)
    wanted = [task.splits[split]] if split in task.splits else [split, *["validation"] * (split == "test")]
    for name in wanted:
        if file := files.get(_SPLITS.get(name, name)):
            return file
    there = f"has no {split} split (found: {', '.join(sorted(path.name for path in files.values()))})"
    raise data_refusal(folder, there, "name it under `splits` in the task, or put it there")


def _read(file: Path) -> list[Row]:
    """Every row as a mapping; raises `DataError` for what is no table."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            return list(_objects(opened) if file.suffix == ".jsonl" else _lines(opened, _DELIMITERS[file.suffix]))
    except (OSError, RecursionError, ValueError, csv.Error) as error:
        raise data_refusal(file, f"cannot be read ({one_line(error)})", "write it again, as text in UTF-8") from error


def _objects(opened: TextIO) -> Iterator[Row]:
    for number, line in enumerate(opened, start=1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is {shown(row)}, wanted an object with names")
            yield row


def _lines(opened: TextIO, delimiter: str) -> Iterator[Row]:
    with _long_cells():
        reader = csv.reader(opened, delimiter=delimiter)
        heads = next(reader, [])
        for cells in filter(None, reader):
            if len(cells) > len(heads):
                raise ValueError(f"line {reader.line_num} has {len(cells)} cells under {len(heads)} names")
            yield dict.fromkeys(heads) | {head: cell or None for head, cell in zip(heads, cells, strict=False)}


@contextmanager
def _long_cells() -> Iterator[None]:
    """Inside the block, a cell may be longer than the 131,072 letters that the library allows."""
    before = csv.field_size_limit(_LONGEST_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)


SOURCE = Source("train.csv and test.csv (or .tsv, .jsonl) with texts and labels", found, _load, _problems, _count, True)
