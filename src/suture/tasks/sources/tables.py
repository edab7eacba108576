"""Data sets of the Hugging Face `datasets` library: a folder as the hub keeps it, or one that `save_to_disk` wrote.

The hub's folders hold parquet files or WebDataset archives, with a card or without one; texts also come as csv, tsv or
jsonl files, named after their splits.

Labels are numbers whose names the data set itself knows. Those names are held against the task's class names: a name
that stands at another place is refused, since accuracy would be that of a shuffled head.
"""

import csv
import json
import re
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from suture.errors import DataError
from suture.tasks.base import Images, Source, Split, Task, Texts
from suture.tasks.class_names import misnamed, places, plain

if TYPE_CHECKING:
    from PIL.Image import Image

_SAVED = ("dataset_dict.json", "state.json")
_STORED = ("*.parquet", "*.arrow", "*.tar", "*.csv", "*.tsv", "*.jsonl")
_OTHER_SPLITS: dict[Split, tuple[str, ...]] = {"train": (), "test": ("validation", "valid", "val")}


class TablePictures(Sequence):
    """The pictures of one column, decoded as RGB each time they are asked for."""

    def __init__(self, table: Any, column: str):
        self.table, self.column = table.select_columns([column]), column

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> "Image":
        try:
            return self.table[index][self.column].convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"Picture {index} of '{self.table.info.dataset_name}' cannot be decoded ({reason})."
            ) from None


def _found(folder: Path) -> bool:
    return _is_saved(folder) or any(next(folder.rglob(pattern), None) for pattern in _STORED)


def _load(folder: Path, split: Split, task: Task) -> Images | Texts:
    with _library():
        table = _saved(folder, split, task) if _is_saved(folder) else _stored(folder, split, task)
    contents, label = _columns(table.features, task)
    labels = torch.tensor(_numbers(table.with_format(None)[label], task))
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(task.classnames):
        found = f"from {int(labels.min())} to {int(labels.max())}"
        raise DataError(f"'{folder}' has labels {found} but there are {len(task.classnames)} class names.")
    names = _names(table.features[label])
    if task.text_columns is None:
        return Images(TablePictures(table, contents[0]), labels, names, table._fingerprint)
    template, plain = next(iter(task.templates), None), table.with_format(None)
    identity = repr((table._fingerprint, contents, template))
    return Texts({name: plain[name] for name in contents}, labels, template, names, identity)


def _problems(folder: Path, split: Split, task: Task) -> list[str]:
    try:
        with _library():
            features = _features(folder, split, task)
        if features is None:
            return []
        _, label = _columns(features, task)
    except DataError as error:
        return [str(error)]
    names = _names(features[label])
    return [] if names is None else misnamed(names, task.own_names, folder)


def _count(folder: Path, split: Split, task: Task) -> int | None:
    with _library():
        if _is_saved(folder):
            return len(_saved(folder, split, task))
        announced = _builder(folder, task).info.splits or {}
        name = _split_name(announced, split, task, folder) if announced else None
    return announced[name].num_examples if name else None


def _features(folder: Path, split: Split, task: Task) -> Any:
    """Columns and their types, from the card or from the first file's header; None where only reading it all tells."""
    if _is_saved(folder):
        return _saved(folder, split, task).features
    builder = _builder(folder, task)
    name = _split_name(builder.config.data_files, split, task, folder)
    if builder.info.features is not None:
        return builder.info.features
    first = Path(str(builder.config.data_files[name][0]))
    if first.suffix != ".parquet":
        return _header(first)
    from datasets import Features
    from pyarrow import ArrowException, parquet

    try:
        return Features.from_arrow_schema(parquet.read_schema(first))
    except (ArrowException, OSError, ValueError) as error:
        raise DataError(f"'{first}' cannot be read ({_one_line(error)}); fetch it again.") from None


def _header(file: Path) -> Any:
    """Names of columns, of types unknown, from a first line; None for other files."""
    if file.suffix not in (".csv", ".tsv", ".jsonl"):
        return None
    try:
        with file.open(encoding="utf-8", newline="") as opened:
            line = next(csv.reader(opened, delimiter="\t" if file.suffix == ".tsv" else ","), [])
            if file.suffix != ".jsonl":
                return dict.fromkeys(line)
            opened.seek(0)
            return dict.fromkeys(json.loads(opened.readline() or "{}"))
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"'{file}' cannot be read ({_one_line(error)}); fetch it again.") from None


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _SAVED)


def _saved(folder: Path, split: Split, task: Task) -> Any:
    from datasets import DatasetDict, load_from_disk

    found = load_from_disk(folder)
    return found[_split_name(found, split, task, folder)] if isinstance(found, DatasetDict) else found


def _stored(folder: Path, split: Split, task: Task) -> Any:
    from datasets import load_dataset_builder

    builder = _builder(folder, task)
    name = _split_name(builder.config.data_files, split, task, folder)
    if builder.name == "parquet":  # else the other splits would be converted with it
        only = {name: list(builder.config.data_files[name])}
        builder = load_dataset_builder("parquet", data_files=only, features=builder.info.features)
    try:
        builder.download_and_prepare()
        return builder.as_dataset(name)
    except Exception as error:  # the library wraps whatever happened in classes of its own
        reason = _one_line(error.__cause__ or error)
        raise DataError(f"'{folder}' cannot be read ({type(error).__name__}: {reason}); fetch it again.") from error


def _builder(folder: Path, task: Task) -> Any:
    from datasets import load_dataset_builder

    name, data_dir = _subset(folder, task.subset)
    try:
        return load_dataset_builder(str(folder.absolute()), name=name, data_dir=data_dir)
    except Exception as error:  # as above
        raise DataError(
            f"'{folder}' is no data set that `datasets` can read ({' '.join(str(error).split())})."
        ) from error


def _subset(folder: Path, subset: str | None) -> tuple[str | None, str | None]:
    """A configuration of the card, or without one the folder of a subset's name."""
    if subset is None:
        return None, None
    card = folder / "README.md"
    in_card = card.is_file() and re.search(rf"config_name:\s*{re.escape(subset)}\s*$", card.read_text("utf-8"), re.M)
    if in_card or not (folder / subset).is_dir():
        return subset, None
    return None, subset


def _split_name(splits: Any, split: Split, task: Task, folder: Path) -> str:
    wanted = [task.splits[split]] if split in task.splits else [split, *_OTHER_SPLITS[split]]
    if name := next((name for name in wanted if name in splits), None):
        return name
    raise DataError(f"'{folder}' has no {split} split (found: {', '.join(map(str, splits)) or 'none'}).")


def _columns(features: Any, task: Task) -> tuple[tuple[str, ...], str]:
    """The columns with the contents and that with the labels: those the task names, or the only ones there can be."""
    from datasets import ClassLabel
    from datasets import Image as ImageFeature

    images = [name for name, feature in features.items() if isinstance(feature, ImageFeature)]
    labels = [name for name, feature in features.items() if isinstance(feature, ClassLabel)] or ["label"]
    only = lambda what, given, candidates: given or (candidates[0] if len(candidates) == 1 else what)
    contents = task.text_columns or (only("image", task.image_column, images),)
    label = only("label", task.label_column, labels)
    key = "text_columns" if task.text_columns else "image_column"
    for name, told in [*((name, key) for name in contents), (label, "label_column")]:
        if name not in features:
            raise DataError(f"there is no column '{name}' (found: {', '.join(features)}); name it under `{told}`.")
    return contents, label


def _names(feature: Any) -> tuple[str, ...] | None:
    return tuple(feature.names) if getattr(feature, "names", None) else None


def _numbers(column: Any, task: Task) -> list[int]:
    """Labels as numbers; text is looked up among the class names."""
    labels = list(column)
    if not labels or not isinstance(labels[0], str):
        return [int(label) for label in labels]
    known = places(task.own_names)
    unknown = next((label for label in labels if plain(label) not in known), None)
    if unknown is not None:
        raise DataError(f"Task {task.name!r}: label {unknown!r} is not among the class names.")
    return [known[plain(label)] for label in labels]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


@contextmanager
def _library():
    """The library there at all, and quiet where nobody watches."""
    try:
        import datasets
    except ImportError:
        raise DataError("reading it takes the `datasets` library: pip install 'suture[data]'.") from None
    shown = datasets.utils.logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


SOURCE = Source(
    "a data set of the `datasets` library (parquet, csv or jsonl files)", _found, _load, _problems, _count, texts=True
)
