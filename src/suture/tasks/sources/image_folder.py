"""Image folders: `<source>/<split>/<class name>/*.png`, as many archives and torchvision have them.

A label is the position of the folder's name among the task's class names, never an alphabetical rank. In a
folder name `_` may stand for a space.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from suture.errors import DataError, data_refusal, problem, shown
from suture.tasks.base import SPLITS, Images, Source, Split, Task, files_identity
from suture.tasks.class_names import nearest, shortened
from suture.tasks.decoding import decoded

if TYPE_CHECKING:
    from PIL.Image import Image

_SPLIT_FOLDERS: dict[Split, tuple[str, ...]] = {"train": ("train",), "test": ("test", "val")}
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".webp")


class PictureFiles(Sequence):
    """Pictures that are decoded, as RGB, each time they are asked for."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> "Image":
        return decoded(self.paths[index], self.paths[index])


def _found(folder: Path) -> bool:
    splits = [_find_split(folder, _SPLIT_FOLDERS[split]) for split in SPLITS]
    return any(path.is_dir() for split in splits if split for path in split.iterdir())


def _load(folder: Path, split: Split, task: Task) -> Images:
    folders = _class_folders(_split_folder(folder, split, task))
    files = [_picture_files(folders[_key(name)]) for name in task.own_names]
    labels = torch.repeat_interleave(torch.tensor([len(paths) for paths in files]))
    names = tuple(folders[_key(name)].name for name in task.own_names)
    pictures = [path for paths in files for path in paths]
    return Images(PictureFiles(pictures), labels, names, files_identity(pictures))


def _count(folder: Path, split: Split, task: Task) -> int:
    return sum(len(_picture_files(path)) for path in _class_folders(_split_folder(folder, split, task)).values())


def _problems(folder: Path, split: Split, task: Task) -> list[str]:
    try:
        root = _split_folder(folder, split, task)
    except DataError as error:
        return [str(error)]
    folders = _class_folders(root)
    wanted = {_key(name): name for name in task.own_names}
    missing = [name for key, name in wanted.items() if key not in folders]
    extra = [path.name for key, path in folders.items() if key not in wanted]
    inside = f"in '{shown(root)}'"
    problems = [
        f"class {n!r} has no folder {inside}{nearest(n, extra)}. Remedy: rename the folder or the class."
        for n in missing
    ]
    problems += [
        f"folder {shown(n)!r} {inside} is not among the class names{nearest(n, missing)}. Remedy: add or remove it."
        for n in extra
    ]
    return shortened(problems + [line for key in wanted if key in folders for line in _picture_problems(folders[key])])


def _picture_problems(folder: Path) -> list[str]:
    """A folder without pictures, and names of pictures that are links to nowhere, pipes or folders."""
    files = _picture_files(folder)
    if not files:
        return [problem(folder, f"holds no image ({', '.join(SUFFIXES)})", "put its pictures there")]
    return [problem(path, "is no regular file", "replace or remove it") for path in files if not path.is_file()]


def _find_split(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def _split_folder(folder: Path, split: Split, task: Task) -> Path:
    accepted = (*([task.splits[split]] if split in task.splits else []), *_SPLIT_FOLDERS[split])
    if path := _find_split(folder, accepted):
        return path
    names = " or ".join(f"'{name}'" for name in accepted)
    raise data_refusal(folder, f"has no folder {names} for the {split} split", "put the pictures there")


def _class_folders(root: Path) -> dict[str, Path]:
    found = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    return {_key(path.name): path for path in found}


def _picture_files(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries)
    return [folder / n for n in names if n.lower().endswith(SUFFIXES) and not n.startswith(".")]


def _key(name: str) -> str:
    return str(name).replace("_", " ")


SOURCE = Source("an image folder (train/<class>/*.png, test/<class>/*.png)", _found, _load, _problems, _count)
