"""Tasks, their images or texts once read, and the interface of a kind of source."""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import numpy as np
from torch import Tensor

from suture.core.batches import Inputs, take
from suture.errors import ConfigError, DataError, data_refusal, shown
from suture.tasks.scoring import Scoring

if TYPE_CHECKING:
    from PIL.Image import Image

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")

#: The fields of a task that are lists, and the kind of their parts; names of classes are looked at by `check`.
_LISTS = {
    "classnames": object,
    "templates": str,
    "labels": object,
    "text_columns": str,
    "test_samples": int,
    "layouts": Mapping,
}
_KINDS = {object: "names", str: "texts", int: "numbers", Mapping: "layouts"}


def _is_list(value: Any) -> bool:
    """Whether a value is a list, a tuple, or such a sequence of another library; a mapping is none."""
    return isinstance(value, Sequence) and not isinstance(value, bytes)


@dataclass(frozen=True)
class Task:
    """A classification data set and the words that make its head or its prompts.

    `source` says where the data is (a folder, a hub id, or `zoo:NAME/PATH`), `classnames` are in label order, and every
    template has a `{}` where the class name goes. A task of texts names its one or two `text_columns`, and a template,
    if its family wants one, has `{column}` where a text goes. `labels` are the source's own names of the classes, in
    the same order, where they are others. `subset`, `image_column`, `label_column` and `splits` (ours → the source's)
    say where to look in a source that leaves a choice. `test_samples` are the test sizes that figures were published
    for, and `layouts` (see `suture.tasks.layouts`) the ways in which archives of this data set lie on disk. A task for
    language models has a `score`, by which it is scored instead of by class names. `model` names the model of the pool
    that is the task's expert, by default the one of its own name; under another name the task is only scored.
    """

    name: str
    source: str
    classnames: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    labels: tuple[str, ...] | None = None
    subset: str | None = None
    image_column: str | None = None
    text_columns: tuple[str, ...] | None = None
    label_column: str | None = None
    splits: Mapping[str, str] = field(default_factory=dict)
    test_samples: tuple[int, ...] = ()
    layouts: tuple[Mapping[str, Any], ...] = ()
    score: Scoring | None = None
    model: str | None = None

    def __post_init__(self):
        if self.score is not None:
            object.__setattr__(self, "score", Scoring.of(self.name, self.score))
        for name, kind in _LISTS.items():
            value = getattr(self, name)
            value = [value] if isinstance(value, str) else value
            if value is not None and not (_is_list(value) and all(isinstance(each, kind) for each in value)):
                self._refuse(name, f"a list of {_KINDS[kind]}")
            object.__setattr__(self, name, None if value is None else tuple(value))
        for name in ("source", "subset", "image_column", "label_column", "model"):
            if not isinstance(getattr(self, name), str | None):
                self._refuse(name, "a text")
        if not isinstance(self.splits, Mapping) or not all(isinstance(each, str) for each in self.splits.values()):
            self._refuse("splits", "a mapping of texts, such as {test: validation}")

    def _refuse(self, name: str, wanted: str) -> NoReturn:
        """Raise the `ConfigError` for a field of another kind than wanted."""
        found = f"Task {self.name!r}: {name} is {shown(getattr(self, name))}"
        raise ConfigError(f"{found}. Remedy: give {wanted}.")

    @property
    def expert(self) -> str:
        """The name of the model that is this task's expert."""
        return self.model or self.name

    @property
    def own_names(self) -> tuple[str, ...]:
        """The names that the source has for the classes, in label order."""
        return self.labels or self.classnames


@dataclass(frozen=True, eq=False)
class Images:
    """The images of one split, in a fixed order.

    `pixels` is a uint8 array, (N, H, W) grey or (N, H, W, 3) RGB, or a sequence of N pictures that decodes on
    access. `labels` is int64 (N,). `classnames` are the names that the source itself has, in label order. `identity`
    changes when the images do; without it nothing that is made of them is kept.
    """

    pixels: "np.ndarray | Sequence[Image]"
    labels: Tensor
    classnames: tuple[str, ...] | None = None
    identity: str | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> "Images":
        """The first images only; what is made of them is not kept."""
        return replace(self, labels=self.labels[:count], identity=None)

    def pictures(self, start: int, stop: int) -> "list[Image]":
        """The images from `start` up to `stop` as RGB pictures."""
        from PIL import Image

        stop = min(stop, len(self))
        if isinstance(self.pixels, np.ndarray):
            return [Image.fromarray(array).convert("RGB") for array in self.pixels[start:stop]]
        return [self.pixels[i] for i in range(start, stop)]


@dataclass(frozen=True, eq=False)
class Texts:
    """The texts of one split, in a fixed order: `columns` name → N texts, in the order in which they are read.

    `template` has `{column}` where a text goes, for models that are asked in words. The rest is as in `Images`.
    """

    columns: Mapping[str, Sequence[str]]
    labels: Tensor
    template: str | None = None
    classnames: tuple[str, ...] | None = None
    identity: str | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> "Texts":
        """The first texts only; what is made of them is not kept."""
        return replace(self, labels=self.labels[:count], identity=None)

    def rows(self, start: int, stop: int) -> list[list[str]]:
        """Each column's texts from `start` up to `stop`; raises `DataError` for what is no text."""
        stop, found = min(stop, len(self)), []
        for name, column in self.columns.items():
            found.append(list(column[start:stop]))
            wrong = next((i for i, text in enumerate(found[-1]) if not isinstance(text, str)), None)
            if wrong is not None:
                kind = type(found[-1][wrong]).__name__
                where = f"Row {start + wrong} has no text in column '{name}' but a {kind}"
                raise DataError(f"{where}. Remedy: remove or fill it.")
        return found

    def prompts(self, start: int, stop: int) -> list[str]:
        """The template with the texts from `start` up to `stop` in it."""
        assert self.template is not None
        names = list(self.columns)
        return [
            filled(self.template, dict(zip(names, row, strict=True)))
            for row in zip(*self.rows(start, stop), strict=True)
        ]


@dataclass(frozen=True, eq=False)
class Tensors:
    """The inputs of one split as a model takes them: (N, …), or argument name → (N, …). The rest is as in `Images`."""

    inputs: Inputs
    labels: Tensor
    classnames: tuple[str, ...] | None = None
    identity: str | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> "Tensors":
        """The first inputs only."""
        part = slice(0, count)
        return replace(self, inputs=take(self.inputs, part), labels=self.labels[part], identity=None)


def filled(template: str, texts: Mapping[str, str]) -> str:
    """A template with texts in place of their names in braces, all at once: braces in a text stay as they are.

    >>> filled("Is '{one}' like '{other}'?", {"one": "{other}", "other": "b"})
    "Is '{other}' like 'b'?"
    """
    pattern = "|".join(re.escape("{" + name + "}") for name in texts)
    return re.sub(pattern, lambda match: texts[match[0][1:-1]], template)


@dataclass(frozen=True)
class Source:
    """One kind of data set on disk.

    `found(folder)` recognises it. `load(folder, split, task)` reads it. `problems`, of the same arguments, says in
    one line each what `load` would stumble over, from names, sizes and labels alone, and `count` how many inputs there
    are, if that is known before they are read. `texts` says whether it can hold texts.
    """

    wanted: str
    found: Callable[[Path], bool]
    load: Callable[[Path, Split, Task], Images | Texts | Tensors]
    problems: Callable[[Path, Split, Task], list[str]]
    count: Callable[[Path, Split, Task], int | None]
    texts: bool = False


def files_identity(paths: Sequence[Path]) -> str:
    """A digest of where files are, their sizes and when they were written; raises `DataError` for one that is gone."""
    sha = hashlib.sha256()
    for path in paths:
        try:
            stat = path.stat()
        except OSError as error:  # a link that leads nowhere or to itself
            raise data_refusal(path, f"cannot be read: {error.strerror}", "replace or remove it") from error
        sha.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return sha.hexdigest()


def unknown_column(name: object, found: Iterable[object], keys: str) -> DataError:
    """The error for a column that a table does not have; `keys` are those of a task that can name it."""
    known = shown(", ".join(map(str, found)))
    return DataError(f"there is no column '{name}' (found: {known}). Remedy: name it under {keys}.")
