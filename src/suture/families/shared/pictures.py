"""Pictures to pixels, with the image processors of `transformers`, on several cores."""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from suture.core.progress import Track
from suture.errors import CheckpointError
from suture.tasks.base import Images

_BATCH = 64


class PictureReader:
    """Resizes and crops pictures with an image processor.

    `shape` is the shape of one input, and `label` the model's name in messages.
    """

    def __init__(self, processor: Any, shape: tuple[int, ...], label: str):
        self.processor, self.shape = processor, shape
        self.label = label

    def decode(self, images: Images, track: Track, description: str, out: Tensor | None = None) -> Tensor:
        """All images, resized and cropped: uint8 (N, *shape), written into `out` if given."""
        pixels = torch.empty((len(images), *self.shape), dtype=torch.uint8) if out is None else out

        def work(start: int) -> int:
            batch = images.pictures(start, start + _BATCH)
            pixels[start : start + len(batch)] = self._resized(batch)
            return len(batch)

        with track(description, len(images)) as advance, ThreadPoolExecutor(os.cpu_count()) as pool:
            for done in pool.map(work, range(0, len(images), _BATCH)):
                advance(done)
        return pixels

    def shape_of(self, picture: Any) -> tuple[int, ...]:
        """The shape of a picture after the processor."""
        return tuple(self._processed([picture])[0].shape)

    @property
    def preprocessing(self) -> str:
        """Everything that determines the pixels beside the picture, as JSON."""
        libraries = {name: version(name) for name in ("pillow", "transformers")}
        return json.dumps([self.processor.to_dict(), self.shape, libraries], sort_keys=True, default=str)

    def standardise(self) -> "Standardise":
        """The step that follows on the device; raises `CheckpointError` without image_mean or image_std."""
        if self.processor.do_normalize and not (self.processor.image_mean and self.processor.image_std):
            raise CheckpointError(f"The processor of '{self.label}' normalises without image_mean or image_std.")
        return Standardise(self.processor)

    def _processed(self, pictures: list) -> list[Tensor]:
        geometry = {"do_rescale": False, "do_normalize": False, "do_convert_rgb": True}
        return [torch.from_numpy(np.asarray(x)) for x in self.processor(pictures, **geometry)["pixel_values"]]

    def _resized(self, pictures: list) -> Tensor:
        images = self._processed(pictures)
        if wrong := [tuple(x.shape) for x in images if tuple(x.shape) != self.shape]:
            raise CheckpointError(
                f"The processor of '{self.label}' makes images of shape {wrong[0]}, the model "
                f"wants {self.shape}. Remedy: correct its size or crop_size."
            )
        return torch.stack(images)


class Standardise(nn.Module):
    """uint8 (B, 3, H, W) → float32, rescaled and normalised as the image processor specifies."""

    mean: Tensor
    std: Tensor

    def __init__(self, processor: Any):
        super().__init__()
        self.rescale = processor.rescale_factor if processor.do_rescale else 1.0
        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
        self.register_buffer("mean", torch.tensor(mean).float().view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).float().view(-1, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return (pixels.float() * self.rescale - self.mean) / self.std


@contextmanager
def quiet() -> Iterator[None]:
    """Silence load reports and progress bars of transformers inside the block."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
