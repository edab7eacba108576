"""Image classifiers of `transformers` (ResNet, ViT, ConvNeXt, …): one merged backbone, and a head for each task.

The pretrained model is any directory of the same architecture, with or without a head. BatchNorm statistics are merged
like weights.
"""

from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from suture.errors import CheckpointError, one_line
from suture.families.shared.classification import Classification
from suture.families.shared.pictures import PictureReader, Standardise, quiet


class ImageClassification(Classification):
    """A model directory with its image processor; experts are models for `AutoModelForImageClassification`."""

    name = "image_classification"
    architectures = ("ForImageClassification",)
    auto = "AutoModelForImageClassification"

    @cached_property
    def reader(self) -> PictureReader:
        """The model's image processor, on Pillow images; the input shape is that of the images it makes."""
        processor = self._processor()
        reader = PictureReader(processor, (), str(self.directory))
        return PictureReader(processor, reader.shape_of(Image.new("RGB", (300, 300))), str(self.directory))

    def prepare(self) -> nn.Module:
        return _PixelValues(self.reader.standardise())

    def example(self) -> dict[str, Tensor]:
        pixels = torch.rand(2, *self.reader.shape, generator=torch.Generator().manual_seed(0))
        return {"pixel_values": pixels}

    def _processor(self) -> Any:
        with quiet():
            from transformers import AutoImageProcessor

            try:
                return AutoImageProcessor.from_pretrained(self.directory, backend="pil", local_files_only=True)
            except Exception as error:  # a damaged file can raise anything
                problem = f"'{self.directory}' has no usable preprocessor_config.json: {one_line(error)}"
                raise CheckpointError(problem) from error


class _PixelValues(nn.Module):
    """Pixels as the argument `pixel_values`: uint8, as decoded, is standardised; float32 is passed through."""

    def __init__(self, standardise: Standardise):
        super().__init__()
        self.standardise = standardise

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        return {"pixel_values": self.standardise(pixels) if pixels.dtype == torch.uint8 else pixels}


FAMILY = ImageClassification
