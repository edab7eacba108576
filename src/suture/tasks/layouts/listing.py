"""Pictures in files of their own, and an index that lists them with their labels.

An index is lines of a text, rows of a CSV or of a MATLAB file, or folders whose names say the class.
"""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from suture.errors import DataError, data_refusal, problem, shown
from suture.tasks.base import Images, Split, Task, files_identity
from suture.tasks.class_names import misnamed, misnumbered, nearest, places, plain, shortened, whole_number
from suture.tasks.layouts import stored
from suture.tasks.layouts.stored import Choices
from suture.tasks.sources.image_folder import PictureFiles

_AGAIN = "fetch it again"


class Entry(NamedTuple):
    """One picture, its label, and what the index calls its class, if it does."""

    path: Path
    label: int
    name: str


@dataclass(frozen=True)
class Listing:
    """An index for each split, and how to read it.

    `line` is a regular expression that a line matches, with a group `label` and perhaps `name` (of the class); of
    tables these are columns, `columns`. Labels are names of classes unless `first_label` says from where they count.
    `picture` says where a row's picture is: columns in braces, `line` the whole line. `label_of` is an address of
    labels by number, where the index only has numbers, from 1. `renamed` has the class names that the index words in
    another way, and `names` is the address of all names in label order.
    """

    index: Mapping[Split, Choices]
    picture: Choices = "{line}"
    line: str | None = None
    columns: Mapping[str, str] | None = None
    first_label: int | None = None
    label_of: Choices | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)
    names: Choices | None = None

    def has(self, folder: Path, split: Split) -> bool:
        """Whether the index of a split is there."""
        return split in self.index and stored.find(folder, self.index[split]) is not None

    def wanted(self, split: Split) -> str:
        """The layout, as messages name it."""
        return stored.shown(self.index[split])

    def load(self, folder: Path, split: Split, task: Task) -> Images:
        """The listed pictures, which decode on access, in the order of the index."""
        entries = self._entries(folder, split, task)
        paths = [entry.path for entry in entries]
        return Images(PictureFiles(paths), torch.tensor([e.label for e in entries]), identity=files_identity(paths))

    def count(self, folder: Path, split: Split, task: Task) -> int:
        """The number of pictures in the index."""
        return len(stored.rows(stored.required(folder, self.index[split], split)))

    def problems(self, folder: Path, split: Split, task: Task) -> list[str]:
        """Labels and class names that do not fit, and pictures that are not there."""
        try:
            index = stored.required(folder, self.index[split], split)
            entries = self._entries(folder, split, task)
            own = stored.find(folder, self.names) if self.names else None
            found = [] if own is None else misnamed(stored.names(own), task.own_names, own)
        except DataError as error:
            return [str(error)]
        if not entries:
            return [problem(index, "lists no picture", _AGAIN)]
        return found or self._unfit(entries, task, str(index)) or _missing(entries, str(index))

    def _entries(self, folder: Path, split: Split, task: Task) -> list[Entry]:
        index = stored.required(folder, self.index[split], split)
        rows = [self._matched(row, number, index) for number, row in enumerate(stored.rows(index), 1)]
        is_folder = index.paths[0].is_dir()
        where, templates = (index.paths[0], ["{line}"]) if is_folder else (folder, stored.several(self.picture))
        templates = [template.replace("{split}", split) for template in templates]
        picture = next((t for t in templates if rows and _path(where, t, rows[0]).is_file()), templates[0])
        labels = self._labels(rows, folder, split, task, index)
        return [
            Entry(_path(where, picture, row), label, str(row.get("name", "")))
            for row, label in zip(rows, labels, strict=True)
        ]

    def _matched(self, row: dict[str, Any], number: int, index: stored.Address) -> dict[str, Any]:
        """A row with its label, and the class's name if it is told, under these names."""
        if self.line is not None:
            found = re.fullmatch(self.line, row["line"])
            if found is None:
                where = f"is {shown(row['line'])!r}, which is not of its form"
                raise DataError(f"line {number} of {problem(index, where, _AGAIN)}")
            return row | found.groupdict()
        missing = [column for column in (self.columns or {}).values() if row.get(column) is None]
        if missing:
            there = f"has no {missing[0]!r} (found: {', '.join(map(str, row))}); it has no labels"
            raise data_refusal(index, there, _AGAIN)
        return row | {key: row[column] for key, column in (self.columns or {}).items()}

    def _labels(
        self, rows: Sequence[Mapping[str, Any]], folder: Path, split: Split, task: Task, index: stored.Address
    ) -> list[int]:
        told: list[Any] = [row.get("label") for row in rows]
        if self.label_of is not None:
            by_number = [row["line"] for row in stored.rows(stored.required(folder, self.label_of, split))]
            lines = [_number(row["line"], index) for row in rows]
            if wrong := next((line for line in lines if not 1 <= line <= len(by_number)), None):
                raise data_refusal(index, f"lists number {wrong}, but there are {len(by_number)} labels", _AGAIN)
            told = [by_number[line - 1] for line in lines]
        if self.first_label is not None:
            return [_number(label, index) - self.first_label for label in told]
        told, known = [self.renamed.get(name, name) for name in told], places(task.classnames, task.own_names)
        if unknown := next((label for label in told if plain(label) not in known), None):
            hint = nearest(unknown, task.classnames)
            listed = f"lists the class {shown(unknown)!r}, which is not among the class names{hint}"
            raise data_refusal(index, listed, "add or remove it")
        return [known[plain(label)] for label in told]

    def _unfit(self, entries: Sequence[Entry], task: Task, index: str) -> list[str]:
        counts = Counter(entry.label for entry in entries)
        if self.first_label is None:
            absent = [name for label, name in enumerate(task.classnames) if not counts[label]]
            remedy = "add some or leave the class out"
            return shortened([problem(index, f"has no picture of the class {name!r}", remedy) for name in absent])
        if found := misnumbered(min(counts), max(counts), task.classnames, index):
            return found
        told = {entry.label: entry.name for entry in entries if entry.name}
        by_label = [told.get(label, name) for label, name in enumerate(task.own_names)]
        return misnamed(by_label, task.own_names, index)


def _number(value: Any, index: stored.Address) -> int:
    number = whole_number(value)
    if number is None:
        raise data_refusal(index, f"has {shown(value)!r} where a whole number was wanted", _AGAIN)
    return number


def _path(folder: Path, template: str, row: Mapping[str, Any]) -> Path:
    return folder / template.format_map(row).lstrip("/")


def _missing(entries: Sequence[Entry], index: str) -> list[str]:
    """Listed pictures that are not there; looks at each folder once."""
    folders = {entry.path.parent for entry in entries}
    there = {folder: set(os.listdir(folder)) if folder.is_dir() else set() for folder in folders}
    gone = [entry.path for entry in entries if entry.path.name not in there[entry.path.parent]]
    if not gone:
        return []
    more = f" (and {len(gone) - 1:,} more of {len(entries):,})" if len(gone) > 1 else ""
    return [f"'{shown(gone[0])}'{more} is missing, but '{shown(index)}' lists it. Remedy: fetch the pictures again."]
