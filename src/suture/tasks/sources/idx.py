"""IDX files, the format of MNIST and its relatives: http://yann.lecun.com/exdb/mnist.

A folder holds `train-images-idx3-ubyte` and `train-labels-idx1-ubyte`, and the same with `t10k` for the test
split, plain (then memory-mapped) or with `.gz`; or a folder `raw` holds them, as torchvision leaves it.
"""

import gzip
import math
import re
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from suture.errors import DataError, data_refusal, one_line, problem
from suture.tasks.base import SPLITS, Images, Source, Split, Task, files_identity
from suture.tasks.class_names import misnumbered

_PREFIXES: dict[Split, str] = {"train": "train", "test": "t10k|test"}
_UBYTE = 0x08
_MOST_COMPRESSED = 1 << 30  # bytes; a compressed file is read into memory, others are mapped
_AGAIN = "fetch it again"


class Header(NamedTuple):
    """The shape an IDX file announces and where its data starts, in bytes."""

    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """The size the whole file must have."""
        return self.offset + math.prod(self.shape)


def read_idx(path: Path) -> np.ndarray:
    """The array of one IDX file, uint8, memory-mapped unless compressed; raises `DataError`."""
    header = checked_header(path)
    if path.suffix != ".gz":
        if not math.prod(header.shape):
            return np.empty(header.shape, np.uint8)
        return np.memmap(path, np.uint8, "r", header.offset, header.shape)
    data = _read(path, header.nbytes + 1)
    if len(data) != header.nbytes:
        raise DataError(_wrong_size(path, header, len(data)))
    return np.frombuffer(data, np.uint8, offset=header.offset).reshape(header.shape)


def checked_header(path: Path) -> Header:
    """The header of a file that is as long as it says; raises `DataError` for any other."""
    header = read_header(path)
    if wrong := _size_problem(path, header):
        raise DataError(wrong)
    return header


def read_header(path: Path) -> Header:
    """The header alone; raises `DataError` when the file is not IDX of unsigned bytes."""
    start = _read(path, 4)
    if len(start) < 4 or start[:2] != b"\0\0" or start[2] != _UBYTE or not 1 <= start[3] <= 4:
        wanted = "wanted 00 00 08 and the number of axes (IDX of unsigned bytes)"
        raise data_refusal(path, f"starts with {start.hex(' ') or 'nothing'}, {wanted}", _AGAIN)
    offset = 4 + 4 * start[3]
    sizes = _read(path, offset)[4:]
    if len(sizes) < 4 * start[3]:
        raise data_refusal(path, "ends inside its header", _AGAIN)
    return Header(tuple(int(n) for n in np.frombuffer(sizes, ">u4")), offset)


def _found(folder: Path) -> bool:
    return any(_find(folder, split, what) for split in SPLITS for what in ("images", "labels"))


def _load(folder: Path, split: Split, task: Task) -> Images:
    images, labels = _file(folder, split, "images"), _file(folder, split, "labels")
    known = torch.from_numpy(read_idx(labels).astype(np.int64))
    return Images(read_idx(images), known, identity=files_identity([images, labels]))


def _count(folder: Path, split: Split, task: Task) -> int:
    return read_header(_file(folder, split, "labels")).shape[0]


def _problems(folder: Path, split: Split, task: Task) -> list[str]:
    try:
        paths = _file(folder, split, "images"), _file(folder, split, "labels")
        headers = [read_header(path) for path in paths]
    except DataError as error:
        return [str(error)]
    cut = [line for line in map(_size_problem, paths, headers) if line]
    return cut or [*_shape_problems(paths, headers), *_label_problems(folder, split, task.classnames)]


def _shape_problems(paths: tuple[Path, Path], headers: list[Header]) -> list[str]:
    images, labels = (header.shape for header in headers)
    problems = []
    if len(images) != 3 and not (len(images) == 4 and images[3] == 3):
        problems.append(problem(paths[0], f"has shape {images}, wanted (N, H, W) or (N, H, W, 3)", _AGAIN))
    if len(labels) != 1:
        problems.append(problem(paths[1], f"has shape {labels}, wanted (N,)", _AGAIN))
    elif images[0] != labels[0]:
        counts = f"has {images[0]} images but '{paths[1].name}' has {labels[0]} labels"
        problems.append(problem(paths[0], counts, _AGAIN))
    if math.prod(images) == 0:
        problems.append(problem(paths[0], f"is empty: it announces shape {images}", _AGAIN))
    return problems


def _label_problems(folder: Path, split: Split, classnames: tuple[str, ...]) -> list[str]:
    """Labels and names must match one to one: judged over both splits, as a small split may lack a class."""
    path = _file(folder, split, "labels")
    try:
        highest = _highest(path)
        files = [_find(folder, other, "labels") for other in SPLITS]
        overall = max(_highest(file) for file in files if file)
    except DataError as error:
        return [str(error)]
    return misnumbered(0, highest, classnames, path, overall)


def _highest(path: Path) -> int:
    labels = read_idx(path)
    return int(labels.max()) if labels.size else -1


def _find(folder: Path, split: Split, what: str) -> Path | None:
    pattern = re.compile(rf"(?:{_PREFIXES[split]})-{what}[-.]idx\d-ubyte(?:\.gz)?")
    places = [place for place in (folder, folder / "raw") if place.is_dir()]
    return next((p for place in places for p in sorted(place.iterdir()) if pattern.fullmatch(p.name)), None)


def _file(folder: Path, split: Split, what: str) -> Path:
    if path := _find(folder, split, what):
        return path
    name = f"{_PREFIXES[split].split('|')[0]}-{what}-idx{3 if what == 'images' else 1}-ubyte"
    missing = f"has no {what} of the {split} split; wanted '{name}' or '{name}.gz'"
    raise data_refusal(folder, missing, "put it there")


def _size_problem(path: Path, header: Header) -> str | None:
    if path.suffix == ".gz" and header.nbytes > _MOST_COMPRESSED:
        shape = " × ".join(map(str, header.shape))
        return problem(path, f"announces {shape} values, too many to unpack into memory", "unpack it with gunzip")
    found = path.stat().st_size if path.suffix != ".gz" else _uncompressed_size(path)
    return None if found == header.nbytes else _wrong_size(path, header, found)


def _wrong_size(path: Path, header: Header, found: int) -> str:
    state = "cut short" if found < header.nbytes else "damaged"
    shape = " × ".join(map(str, header.shape))
    sizes = f"announces {shape} values ({header.nbytes} bytes) but holds {found} bytes; it is {state}"
    return problem(path, sizes, _AGAIN)


def _uncompressed_size(path: Path) -> int:
    """The size that a gzip file states, modulo 2³², in its last four bytes; arbitrary when it is cut short."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4))
        return int.from_bytes(file.read(4), "little")


def _read(path: Path, count: int) -> bytes:
    try:
        if not path.is_file():
            raise data_refusal(path, "is no regular file", "replace or remove it")
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return file.read(count)
    except (OSError, EOFError, zlib.error) as error:
        raise data_refusal(path, f"cannot be read ({one_line(error)})", _AGAIN) from error


SOURCE = Source("IDX files (train-images-idx3-ubyte, ...)", _found, _load, _problems, _count)
