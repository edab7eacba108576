"""Contents of the files of a data set, by address: `FILE`, or `FILE:NAME` for one of the things in a file.

MATLAB and HDF5 files, IDX, pickled arrays, columns of a CSV, raw bytes, lines of a text, folders of pictures. `*` in an
address stands for several files, one after another; `FILE:NAME[COLUMN=VALUE,…]` for some rows of a CSV.
"""

import csv
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from suture.errors import DataError, data_refusal, one_line
from suture.tasks.base import Split
from suture.tasks.layouts.pickled import as_array, read_pickled
from suture.tasks.sources.idx import checked_header, read_idx
from suture.tasks.sources.image_folder import SUFFIXES

Choices = str | Sequence[str]
_MOST_ENTRIES = 1 << 32  # of an array that is unpacked into memory


class Address(NamedTuple):
    """Files that are there, and the name of what is meant in them."""

    paths: tuple[Path, ...]
    name: str

    def __str__(self) -> str:
        return str(self.paths[0])


def find(folder: Path, choices: Choices) -> Address | None:
    """The first of several addresses whose files are there; a folder counts if it holds folders."""
    for choice in several(choices):
        pattern, _, name = choice.partition(":")
        plain = sorted(folder.glob(pattern)) if "*" in pattern else [folder / pattern]
        paths = [path for path in (*plain, folder / f"{pattern}.gz") if _is_there(path)]
        if paths:
            return Address(tuple(paths), name)
    return None


def required(folder: Path, choices: Choices, split: Split) -> Address:
    """The same; raises `DataError` where none is there."""
    if found := find(folder, choices):
        return found
    raise data_refusal(folder, f"has no {shown(choices)} for the {split} split", "put it there")


def shown(choices: Choices) -> str:
    """Addresses as a message names them: the files."""
    each = dict.fromkeys(choice.partition(":")[0] for choice in several(choices))
    return " or ".join(f"'{name}'" for name in each)


def several(choices: Choices) -> Sequence[str]:
    """One text or several, as several."""
    return (choices,) if isinstance(choices, str) else choices


def read(address: Address) -> Any:
    """The array at an address, memory-mapped or lazy where the format allows; raises `DataError`."""
    parts = []
    for path in address.paths:
        with _reading(path, address.name):
            parts.append(_format(path).read(path, address.name))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def shape(address: Address) -> tuple[int, ...]:
    """The shape of the array at an address, from the header where the format has one; raises `DataError`."""
    shapes = []
    for path in address.paths:
        with _reading(path, address.name):
            shapes.append(_format(path).shape(path, address.name))
    return (sum(found[0] for found in shapes), *shapes[0][1:]) if len(shapes) > 1 else shapes[0]


def names(address: Address) -> list[str]:
    """Names of classes: the lines of a text, or the texts of an array."""
    if address.paths[0].suffix == ".txt":
        return [row["line"] for row in rows(address)]
    return [str(_scalar(item)) for item in np.ravel(read(address))]


def rows(address: Address) -> list[dict[str, Any]]:
    """The rows of an index, by column name or `line`, or the pictures of a folder. Raises `DataError`."""
    path = address.paths[0]
    if path.is_dir():
        return [{"line": line} for line in _pictures_below(path)]
    with _reading(path, address.name):
        if path.suffix == ".csv":
            return list(_csv_rows(path))
        if path.suffix != ".mat":
            lines = path.read_text("utf-8").splitlines()
            return [{"line": line.strip()} for line in lines if line.strip()]
    found = np.ravel(read(address))
    if found.dtype.names:
        return [{name: _scalar(row[name]) for name in found.dtype.names} for row in found]
    return [{"line": _scalar(item)} for item in found]


class _Format(NamedTuple):
    read: Callable[[Path, str], Any]
    shape: Callable[[Path, str], tuple[int, ...]]


def _format(path: Path) -> _Format:
    suffix = "ubyte" if path.name.removesuffix(".gz").endswith("ubyte") else path.suffix
    return _FORMATS.get(suffix, _FORMATS[""])


@contextmanager
def _reading(path: Path, name: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except ImportError as error:
        raise data_refusal(path, f"takes {error.name} to be read", "pip install 'suture[data]'") from None
    except KeyError:
        raise data_refusal(path, f"has no '{name}'; it is another file than its name says", "fetch it again") from None
    except Exception as error:  # each format's library has errors of its own
        reason = one_line(error) or type(error).__name__
        raise data_refusal(path, f"cannot be read ({reason})", "fetch it again") from error


def _is_there(path: Path) -> bool:
    return path.is_file() or (path.is_dir() and any(child.is_dir() for child in path.iterdir()))


def _scalar(value: Any) -> Any:
    """The one value in MATLAB's nested arrays."""
    while isinstance(value, np.ndarray):
        value = value.ravel()[0]
    return value.item() if isinstance(value, np.generic) else value


def _pictures_below(folder: Path) -> list[str]:
    found = []
    for place, _, files in os.walk(folder):
        found += [os.path.join(place, name) for name in files if name.lower().endswith(SUFFIXES)]
    return sorted(Path(path).relative_to(folder).as_posix() for path in found)


def _csv_rows(path: Path) -> Iterator[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        head = file.readline()
        delimiter = ";" if ";" in head else ","
        fields = [field.strip() for field in head.strip().split(delimiter)]
        yield from csv.DictReader(file, fields, delimiter=delimiter, skipinitialspace=True)


def _column(path: Path, name: str) -> Iterator[str]:
    """The values of one column in the rows that are asked for."""
    wanted = re.fullmatch(r"(\w+)(?:\[(\w+)=(.+)\])?", name)
    if wanted is None:
        raise KeyError(name)
    column, key, values = wanted.groups()
    for row in _csv_rows(path):
        if key is None or row[key] in values.split(","):
            yield row[column]


def _csv_read(path: Path, name: str) -> np.ndarray:
    return np.array([np.array(text.split(), np.uint8) for text in _column(path, name)])


def _csv_shape(path: Path, name: str) -> tuple[int, ...]:
    values = [len(text.split()) if row == 0 else 0 for row, text in enumerate(_column(path, name))]
    return (len(values), values[0] if values else 0)


def _mat_read(path: Path, name: str) -> np.ndarray:
    from scipy.io import loadmat

    if math.prod(_mat_shape(path, name)) > _MOST_ENTRIES:
        raise ValueError(f"more than {_MOST_ENTRIES} values")
    return loadmat(path, variable_names=[name])[name]


def _mat_shape(path: Path, name: str) -> tuple[int, ...]:
    from scipy.io import whosmat

    return {found: size for found, size, _ in whosmat(path)}[name]


def _hdf5_read(path: Path, name: str) -> Any:
    import h5py

    return h5py.File(path, "r")[name]


def _raw_read(path: Path, name: str) -> np.ndarray:
    return np.memmap(path, np.uint8, "r")


def _pickle_read(path: Path, name: str) -> np.ndarray:
    return as_array(read_pickled(path)[name])


_FORMATS = {
    ".bin": _Format(_raw_read, lambda path, name: (path.stat().st_size,)),
    ".csv": _Format(_csv_read, _csv_shape),
    ".h5": _Format(_hdf5_read, lambda path, name: _hdf5_read(path, name).shape),
    ".mat": _Format(_mat_read, _mat_shape),
    "ubyte": _Format(lambda path, name: read_idx(path), lambda path, name: checked_header(path).shape),
    "": _Format(_pickle_read, lambda path, name: _pickle_read(path, name).shape),
}
