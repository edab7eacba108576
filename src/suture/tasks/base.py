"""What a task is, what its images look like once found, and what a kind of source has to provide."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")


@dataclass(frozen=True)
class Task:
    """A classification data set and the words that make its zero-shot head.

    `source` says where the data is (a folder, or `zoo:NAME/PATH`), `classnames` are in label order, and every
    template has a `{}` where the class name goes.
    """

    name: str
    source: str
    classnames: tuple[str, ...]
    templates: tuple[str, ...]

    def __post_init__(self):
        object.__setattr__(self, "classnames", tuple(self.classnames))
        object.__setattr__(self, "templates", tuple(self.templates))


@dataclass(frozen=True, eq=False)
class Images:
    """The images of one split, in a fixed order.

    `pixels` is a uint8 array, (N, H, W) grey or (N, H, W, 3) RGB, or a sequence of N pictures that decodes on
    access. `labels` is int64 (N,). `classnames` are the names that the source itself has, in label order.
    """

    pixels: "np.ndarray | Sequence[Image]"
    labels: Tensor
    classnames: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def pictures(self, start: int, stop: int) -> "list[Image]":
        """The images from `start` up to `stop` as RGB pictures."""
        from PIL import Image

        stop = min(stop, len(self))
        if isinstance(self.pixels, np.ndarray):
            return [Image.fromarray(array).convert("RGB") for array in self.pixels[start:stop]]
        return [self.pixels[i] for i in range(start, stop)]


@dataclass(frozen=True)
class Source:
    """One kind of data set on disk.

    `found(folder)` recognises it. `load(folder, split, classnames)` reads it. `problems`, of the same
    arguments, says in one line each what `load` would stumble over, from names, sizes and labels alone.
    """

    wanted: str
    found: Callable[[Path], bool]
    load: Callable[[Path, Split, tuple[str, ...]], Images]
    problems: Callable[[Path, Split, tuple[str, ...]], list[str]]
