"""Images and labels as arrays in files: MATLAB's (SVHN), pickles (CIFAR), raw bytes (STL-10), HDF5 (PCam), CSV, IDX."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from suture.errors import DataError, data_refusal, one_line, problem, shown
from suture.tasks.base import Images, Split, Task, files_identity
from suture.tasks.class_names import misnamed, misnumbered, whole_number
from suture.tasks.layouts import stored
from suture.tasks.layouts.stored import Address, Choices

if TYPE_CHECKING:
    from PIL.Image import Image

_AGAIN = "fetch it again"
_MOST_LABELS = 1_000_000_000


@dataclass(frozen=True)
class Arrays:
    """Addresses of the images and the labels of each split, and how their axes lie.

    `axes` has a letter for each axis of the stored images (N, H, W, C). `shape` is that of one image where the file
    has images as rows of bytes. Labels count from `first_label`; `renamed` has those that stand for others (SVHN's
    10 is the digit 0). `names` is the address of the class names, where the files have them.
    """

    images: Mapping[Split, Choices]
    labels: Mapping[Split, Choices]
    axes: str = "NHWC"
    shape: Sequence[int] = ()
    first_label: int = 0
    renamed: Mapping[int, int] = field(default_factory=dict)
    names: Choices | None = None

    def has(self, folder: Path, split: Split) -> bool:
        """Whether the images or the labels of a split are there."""
        return any(split in part and stored.find(folder, part[split]) for part in (self.images, self.labels))

    def wanted(self, split: Split) -> str:
        """The layout, as messages name it."""
        return stored.shown(self.images[split])

    def load(self, folder: Path, split: Split, task: Task) -> Images:
        """The images, mapped or read, and their labels from 0."""
        images, labels = self._addresses(folder, split)
        identity = f"{files_identity(images.paths)} {images.name} {self.axes} {self.shape}"
        return Images(self._pixels(images), torch.from_numpy(self._labels(labels)), identity=identity)

    def count(self, folder: Path, split: Split, task: Task) -> int:
        """The number of images, from the header."""
        return self._shape(stored.required(folder, self.images[split], split))[0]

    def problems(self, folder: Path, split: Split, task: Task) -> list[str]:
        """Sizes that do not fit, and labels and names that do not fit the class names."""
        try:
            images, labels = self._addresses(folder, split)
            shape, numbers = self._shape(images), self._labels(labels)
            own = stored.find(folder, self.names) if self.names else None
            found = [] if own is None else misnamed(stored.names(own), task.own_names, own)
        except DataError as error:
            return [str(error)]
        if shape[0] != len(numbers):
            counts = f"has {shape[0]} images but '{labels.paths[0].name}' has {len(numbers)} labels"
            return [problem(images, counts, _AGAIN)]
        if not prod(shape):
            return [problem(images, f"is empty: its images have shape {shape}", _AGAIN)]
        return found or misnumbered(int(numbers.min()), int(numbers.max()), task.classnames, labels)

    def _addresses(self, folder: Path, split: Split) -> tuple[Address, Address]:
        return (
            stored.required(folder, self.images[split], split),
            stored.required(folder, self.labels[split], split),
        )

    def _labels(self, labels: Address) -> np.ndarray:
        array = stored.read(labels)
        if prod(array.shape) > _MOST_LABELS:
            raise data_refusal(labels, f"has more than {_MOST_LABELS:,} labels", _AGAIN)
        values = np.ravel(array).tolist()
        numbers = [_label(value, labels) for value in values]
        return np.array([self.renamed.get(number, number) for number in numbers], np.int64) - self.first_label

    def _shape(self, images: Address) -> tuple[int, ...]:
        """(N, H, W) or (N, H, W, 3), from the header."""
        found = stored.shape(images)
        if self.shape:
            number, rest = divmod(prod(found), prod(self.shape))
            if rest:
                raise data_refusal(images, f"holds {prod(found)} bytes, no whole number of images", _AGAIN)
            found = (number, *self.shape)
        if len(found) != len(self.axes):
            raise data_refusal(images, f"has images of shape {found}, wanted axes {self.axes}", _AGAIN)
        return tuple(found[axis] for axis in self._order)

    @property
    def _order(self) -> list[int]:
        return [self.axes.index(axis) for axis in "NHWC" if axis in self.axes]

    def _pixels(self, images: Address) -> "np.ndarray | ArrayPictures":
        found = stored.read(images)
        if found.dtype != np.uint8:
            raise data_refusal(images, f"has images of {found.dtype}, wanted uint8", _AGAIN)
        if not isinstance(found, np.ndarray):
            return ArrayPictures(found)
        return (found.reshape(-1, *self.shape) if self.shape else found).transpose(self._order)


def _label(value: Any, labels: Address) -> int:
    number = whole_number(value)
    if number is None or abs(number) > _MOST_LABELS:
        raise data_refusal(labels, f"has the label {shown(value)}, which is no class", _AGAIN)
    return number


class ArrayPictures(Sequence):
    """The pictures of an array that stays in its file, (N, H, W, 3), read each time they are asked for."""

    def __init__(self, array: Any):
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> "Image":
        from PIL import Image

        try:
            pixels = self.array[index]
        except Exception as error:  # the file's own library reads only now
            problem = f"cannot be read at image {index} ({one_line(error)})"
            raise data_refusal(getattr(self.array.file, "filename", "the array"), problem, _AGAIN) from error
        return Image.fromarray(pixels).convert("RGB")
