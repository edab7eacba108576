"""Image classifiers of timm, from directories as its hub or transformers' TimmWrapper saves them; needs that library.

Everything but the classifier is merged; the classifier stays each expert's own.
"""

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from suture.errors import CheckpointError, ConfigError, one_line, problem, shown
from suture.families.module import ModuleFamily, Transform
from suture.families.shared.pictures import PictureReader, Standardise, quiet
from suture.tasks.base import Task

_WRAPPER = "timm_model."
_CROPS = ("center", "squash")
_FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}


class Timm(ModuleFamily):
    """A directory whose config.json names an `architecture` of timm; experts are directories or files of weights.

    Pictures are resized and cropped as the pretrained configuration says, on Pillow.
    """

    name = "timm"
    known_settings = frozenset()

    @classmethod
    def recognises(cls, directory: Path) -> bool:
        """Whether a directory's configuration names an architecture of timm."""
        try:
            config = json.loads((directory / "config.json").read_text("utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(config, Mapping) and "architecture" in config and "pretrained_cfg" in config

    @cached_property
    def reader(self) -> PictureReader:
        """The resizing and cropping of the pretrained configuration."""
        with quiet():
            from transformers import CLIPImageProcessorPil as Centred
            from transformers import ViTImageProcessorPil as Squashed
        picture = self._picture
        _, height, width = picture["input_size"]
        options = {
            "image_mean": list(picture["mean"]),
            "image_std": list(picture["std"]),
            "resample": picture["filter"],
        }
        if picture["crop_mode"] == "squash":
            sides = {"height": int(height / picture["crop_pct"]), "width": int(width / picture["crop_pct"])}
            processor = Squashed(size=sides, **options)
        else:
            side = {"shortest_edge": int(height / picture["crop_pct"])}
            processor = Centred(size=side, crop_size={"height": height, "width": width}, **options)
        return PictureReader(processor, (3, height, width), str(self.directory))

    def problems(self, task: Task) -> list[str]:
        if task.text_columns is not None:
            return [f"Task {task.name!r} has text_columns, but family=timm reads pictures. Remedy: leave them out."]
        return super().problems(task)

    @cached_property
    def _config(self) -> Mapping[str, Any]:
        path = self.directory / "config.json"
        try:
            config = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                problem(path, f"cannot be read ({one_line(error)})", "save the model again")
            ) from error
        if not self.recognises(self.directory) or not isinstance(config["pretrained_cfg"], Mapping):
            remedy = "save the model with timm.models.save_for_hf or transformers"
            raise CheckpointError(problem(path, "names no architecture of timm with its pretrained_cfg", remedy))
        return config

    @cached_property
    def _picture(self) -> dict[str, Any]:
        """The preparation of pictures; refused unless the result is the same as timm's own."""
        given, path = self._config["pretrained_cfg"], self.directory / "config.json"
        picture = {"input_size": [3, 224, 224], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
        picture |= {"interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center"}
        picture |= {key: given[key] for key in picture if given.get(key) is not None}
        size = picture["input_size"]
        square = picture["crop_mode"] == "squash" or size[1] == size[2]
        if picture["crop_mode"] not in _CROPS or size[0] != 3 or not square or picture["interpolation"] not in _FILTERS:
            found = f"prepares pictures by {shown({key: picture[key] for key in ('input_size', 'crop_mode')})}"
            raise CheckpointError(problem(path, found, "wanted three channels, and a square or squashed crop"))
        if picture["crop_mode"] == "squash" and picture["crop_pct"] != 1:
            raise CheckpointError(
                problem(path, "squashes pictures and crops them too", "wanted crop_pct 1 with squash")
            )
        return picture | {"filter": _FILTERS[picture["interpolation"]]}

    @cached_property
    def _made(self) -> tuple[nn.Module, Transform | None]:
        try:
            import timm  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigError(f"family=timm takes the timm library ({one_line(error)}): pip install timm.") from None
        arguments = self._config.get("model_args") or {}
        try:
            with torch.random.fork_rng(devices=[]):
                model = timm.create_model(self._config["architecture"], pretrained=False, num_classes=2, **arguments)
        except Exception as error:  # the library raises a different class for almost every problem
            raise CheckpointError(f"'{self.directory}' holds no model of timm: {one_line(error)}") from error
        return model.float().eval().requires_grad_(False), None

    @cached_property
    def _head_name(self) -> str:  # type: ignore[override]
        name = getattr(self._made[0], "pretrained_cfg", {}).get("classifier")
        if not isinstance(name, str):
            raise CheckpointError(f"'{self.directory}' has {shown(name)} for a classifier; wanted one linear layer.")
        return name

    def _spelling(self, stored: str) -> str:
        return stored.removeprefix(_WRAPPER)

    def _prepare(self) -> Standardise:
        return self.reader.standardise()


FAMILY = Timm
