"""Data sets of the Hugging Face `datasets` library: a folder as the hub keeps it, or one that `save_to_disk` wrote.

The hub's folders hold parquet files or WebDataset archives, with a card or without one; texts also come as csv, tsv or
jsonl files; those of one file for each split need no library (`row_files`).

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

from suture.errors import DataError, data_refusal, one_line, shown
from suture.tasks.base import Images, Source, Split, Task, Texts, unknown_column
from suture.tasks.class_names import misnamed, numbered
from suture.tasks.decoding import decoded
from suture.tasks.sources import row_files

if TYPE_CHECKING:
    from PIL.Image import Image

_SAVED = ("dataset_dict.json", "state.json")
_STORED = ("*.parquet", "*.arrow", "*.tar", "*.csv", "*.tsv", "*.jsonl")
_AGAIN = "fetch it again"
_LARGEST_LOOKED_AT = 500_000_000  # bytes of a text file that a check reads for its labels
_OTHER_SPLITS: dict[Split, tuple[str, ...]] = {"train": (), "test": ("validation", "valid", "val")}


class TablePictures(Sequence):
    """The pictures of one column, decoded as RGB each time they are asked for."""

    def __init__(self, table: Any, column: str):
        from datasets import Image

        self.table, self.column = table.select_columns([column]).cast_column(column, Image(decode=False)), column

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> "Image":
        name = f"picture {index} of {self.table.info.dataset_name}"
        stored = self.table[index][self.column] or {}
        content, path = stored.get("bytes"), stored.get("path")
        if content is None and path is None:
            raise data_refusal(name, "is missing", "fill or remove that row")
        return decoded(Path(str(path)) if content is None else content, name, turned=True)


def _found(folder: Path) -> bool:
    if row_files.found(folder):
        return False  # it needs no library
    return _is_saved(folder) or any(next(folder.rglob(pattern), None) for pattern in _STORED)


def _load(folder: Path, split: Split, task: Task) -> Images | Texts:
    with _library():
        table = _saved(folder, split, task) if _is_saved(folder) else _stored(folder, split, task)
    contents, label = _columns(table.features, task)
    if task.text_columns is None:
        _check_pictures(table.features, contents[0], folder)
    labels = torch.tensor(_numbered(table.with_format(None)[label], task, folder), dtype=torch.int64)
    names = _names(table.features[label])
    if task.text_columns is None:
        return Images(TablePictures(table, contents[0]), labels, names, table._fingerprint)
    template, plain = next(iter(task.templates), None), table.with_format(None)
    identity = repr((table._fingerprint, contents, template))
    return Texts({name: plain[name] for name in contents}, labels, template, names, identity)


def stored_rows(folder: Path, split: Split, task: Task, wanted: Sequence[str]) -> tuple[list[dict[str, Any]], str]:
    """Rows with the wanted columns of any kind, and their identity; raises `DataError` for a missing column."""
    if row_files.found(folder):
        return row_files.rows_of(folder, split, task, wanted)
    if not _found(folder):
        remedy = "put parquet, csv or jsonl files there, or plain texts as test.txt"
        raise data_refusal(folder, "holds no table and no plain text of the split", remedy)
    with _library():
        table = _saved(folder, split, task) if _is_saved(folder) else _stored(folder, split, task)
    for name in wanted:
        if name not in table.features:
            raise unknown_column(name, table.features, "`text_columns`, `label_column` or `score.choices_column`")
    plain = table.select_columns(list(wanted)).with_format(None)
    return [dict(row) for row in plain], table._fingerprint


def _problems(folder: Path, split: Split, task: Task) -> list[str]:
    try:
        with _library():
            features = _features(folder, split, task)
        if features is None:
            return []
        contents, label = _columns(features, task)
        if task.text_columns is None and features[contents[0]] is not None:
            _check_pictures(features, contents[0], folder)
        names = _names(features[label])
        if names is not None:
            return misnamed(names, task.own_names, folder)
        with _library():
            _numbered(_labels_alone(folder, split, task, label), task, folder)
    except DataError as error:
        return [str(error)]
    return []


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
        raise data_refusal(first, f"cannot be read ({one_line(error)})", _AGAIN) from error


def _labels_alone(folder: Path, split: Split, task: Task, label: str) -> Sequence[Any]:
    """The labels of a split without its contents; of kinds of file that would have to be unpacked for them, none."""
    if _is_saved(folder):
        return _saved(folder, split, task).with_format(None)[label]
    data_files = _builder(folder, task).config.data_files
    files = [Path(str(file)) for file in data_files[_split_name(data_files, split, task, folder)]]
    return [value for file in files for value in _labels_of(file, label)]


def _labels_of(file: Path, label: str) -> Sequence[Any]:
    from pyarrow import ArrowException, parquet

    try:
        if file.suffix == ".parquet":
            return parquet.read_table(file, columns=[label]).column(label).to_pylist()
        if file.suffix not in (".csv", ".tsv", ".jsonl") or file.stat().st_size > _LARGEST_LOOKED_AT:
            return []
        with file.open(encoding="utf-8", newline="") as stream:
            if file.suffix == ".jsonl":
                return [json.loads(line).get(label) for line in stream if line.strip()]
            texts = [row.get(label) for row in csv.DictReader(stream, delimiter="\t" if file.suffix == ".tsv" else ",")]
    except (ArrowException, AttributeError, KeyError, OSError, RecursionError, ValueError, csv.Error) as error:
        raise data_refusal(file, f"cannot be read ({one_line(error)})", _AGAIN) from error
    try:
        return [float(text or "nan") for text in texts]  # what the library takes for numbers, it reads as such
    except ValueError:
        return []


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
            first = json.loads(opened.readline() or "{}")
    except (OSError, RecursionError, ValueError, csv.Error) as error:
        raise data_refusal(file, f"cannot be read ({one_line(error)})", _AGAIN) from error
    if not isinstance(first, dict):
        raise data_refusal(file, f"has {shown(first)} in its first line, wanted an object with names", _AGAIN)
    return dict.fromkeys(first)


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _SAVED)


def _saved(folder: Path, split: Split, task: Task) -> Any:
    from datasets import DatasetDict, load_from_disk

    try:
        saved = load_from_disk(folder)
    except Exception as error:  # as below
        raise data_refusal(folder, f"cannot be read ({type(error).__name__}: {one_line(error)})", _AGAIN) from error
    return saved[_split_name(saved, split, task, folder)] if isinstance(saved, DatasetDict) else saved


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
        reason = f"{type(error).__name__}: {one_line(error.__cause__ or error)}"
        raise data_refusal(folder, f"cannot be read ({reason})", _AGAIN) from error


def _builder(folder: Path, task: Task) -> Any:
    from datasets import load_dataset_builder

    name, data_dir = _subset(folder, task.subset)
    try:
        return load_dataset_builder(str(folder.absolute()), name=name, data_dir=data_dir)
    except Exception as error:  # as above
        problem = f"is no data set that `datasets` can read ({one_line(error)})"
        raise data_refusal(folder, problem, _AGAIN) from error


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
    found = f"has no {split} split (found: {', '.join(map(str, splits)) or 'none'})"
    raise data_refusal(folder, found, "name it under `splits` in the task, or put it there")


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
            raise unknown_column(name, features, f"`{told}`")
    return contents, label


def _names(feature: Any) -> tuple[str, ...] | None:
    return tuple(feature.names) if getattr(feature, "names", None) else None


def _check_pictures(features: Any, column: str, folder: Path) -> None:
    """Refuse a column of something else than pictures: the library's own, bytes, or a struct with bytes."""
    from datasets import Image

    kind = features[column]
    plain = getattr(kind, "dtype", None) in ("binary", "large_binary")
    if not isinstance(kind, Image) and not plain and not (isinstance(kind, dict) and {"bytes", "path"} == kind.keys()):
        found = f"has {shown(kind)} in column '{column}', not pictures"
        raise data_refusal(folder, found, "name the column of pictures under `image_column`")


def _numbered(labels: Any, task: Task, folder: Path) -> list[int]:
    return numbered(list(labels), task.own_names, len(task.classnames), folder)


@contextmanager
def _library():
    """The library there at all, and quiet where nobody watches."""
    try:
        import datasets
    except ImportError:
        raise DataError("reading it takes the `datasets` library. Remedy: pip install 'suture[data]'.") from None
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
