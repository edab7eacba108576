"""CLIP as open_clip names it, and as the authors of Task Arithmetic publish it (https://arxiv.org/abs/2212.04089).

Canonical names are open_clip's. Of a whole open_clip state dict only the vision tower is merged. Of a pickled
`ImageEncoder` everything is merged, as in the authors' scripts: besides the vision tower it holds token embeddings that
fine-tuning did not change, and their zeros count when TIES trims a share of all entries.

Heads are files (`heads` in the pool, one for each task: the authors' `head_<Dataset>.pt`), or are made by the text
tower if the pretrained checkpoint has one.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from suture.checkpoints import open_checkpoint
from suture.core.head import Head
from suture.core.progress import Track, untracked
from suture.errors import CheckpointError, ConfigError, unknown_name
from suture.families.shared.base import Encoder, Family
from suture.families.shared.models import copy_into
from suture.families.shared.pictures import PictureReader, Standardise, quiet
from suture.families.shared.zero_shot import cached, without_templates, zero_shot_head
from suture.storage.cache import digest
from suture.tasks.base import Task

_VISUAL, _TEXT_BLOCKS = "visual.", "transformer.resblocks."
_PICKLED = "model."
_HEAD_WIDTH = 64  # dimensions of an attention head in every CLIP


class OpenClipEncoder(Encoder):
    """The vision tower with its projection: pixels (B, 3, H, W), uint8 or standardised → features (B, D).

    The other tensors of an `ImageEncoder` are parameters too, so that names match, but no input reaches them.
    """

    def __init__(self, tower: nn.Module, others: Mapping[str, Tensor], standardise: Standardise):
        super().__init__()
        self.visual, self.standardise = tower, standardise
        for name, tensor in others.items():
            *path, last = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(last, nn.Parameter(tensor.float().clone()))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.visual(self.standardise(pixels) if pixels.dtype == torch.uint8 else pixels)

    def load(self, state: Mapping[str, Tensor]) -> "OpenClipEncoder":
        """Copy in the weights of another model of this architecture; raises `CheckpointError` if they do not fit."""
        copy_into(self, state, OpenClip.canonical_names)
        return self


class OpenClip(Family):
    """An open_clip state dict, or a pickled `ImageEncoder`; the architecture is read from its shapes.

    Settings: `quick_gelu` (by default true, as in OpenAI's weights; open_clip's own models mostly use GELU), and
    `heads`, a mapping task → file.
    """

    name = "open_clip"
    known_settings = frozenset({"quick_gelu", "heads"})

    @classmethod
    def recognises(cls, directory: Path) -> bool:
        """Whether a directory has open_clip's configuration."""
        return (directory / "open_clip_config.json").is_file()

    @staticmethod
    def canonical_names(names: Iterable[str]) -> dict[str, str]:
        """open_clip's name → stored name, for the tensors that are merged.

        >>> OpenClip.canonical_names(["model.visual.proj", "model.logit_scale"])
        {'visual.proj': 'model.visual.proj', 'logit_scale': 'model.logit_scale'}
        >>> OpenClip.canonical_names(["visual.proj", "logit_scale", "transformer.resblocks.0.ln_1.bias"])
        {'visual.proj': 'visual.proj'}
        """
        stored_names = {name.removeprefix(_PICKLED): name for name in names}
        if not any(name.startswith(_TEXT_BLOCKS) for name in stored_names):
            return stored_names
        return {name: stored for name, stored in stored_names.items() if name.startswith(_VISUAL)}

    def encoder(self, state: Mapping[str, Tensor] | None = None) -> OpenClipEncoder:
        names = self.canonical_names(self.weights)
        others = {name: self.weights[stored] for name, stored in names.items() if not name.startswith(_VISUAL)}
        tower = self._build(with_text=False).visual
        encoder = OpenClipEncoder(tower, others, self.reader.standardise()).eval().requires_grad_(False)
        return encoder.load(self.weights if state is None else state)

    def head(self, task: Task, track: Track = untracked) -> Head:
        """The rows of a head file, which include the logit scale, or class directions with the model's logit scale."""
        if heads := self.settings.get("heads"):
            return Head(self._stored_head(heads, task.name, len(task.classnames)), normalised=True)
        if not self._has_text_tower:
            raise ConfigError(
                f"'{self.label}' has no text tower to make a head for '{task.name}' with. "
                "Remedy: give head files under modelpool.heads, or a whole open_clip checkpoint as _pretrained_."
            )
        directions = self.directions(task.classnames, task.templates, track)
        return Head(directions, scale=self._named["logit_scale"].float().exp().item(), normalised=True)

    def problems(self, task: Task) -> list[str]:
        return [*super().problems(task), *([] if self.settings.get("heads") else without_templates(task))]

    def directions(self, classnames: Sequence[str], templates: Sequence[str], track: Track = untracked) -> Tensor:
        """Zero-shot class directions (C, D) from the text tower; cached on disk by content."""
        text = {name: tensor for name, tensor in self._named.items() if not name.startswith(_VISUAL)}
        key = digest(text, [], "open_clip head", self.quick_gelu, list(classnames), list(templates))
        return cached(key, lambda: zero_shot_head(self._encode_text, classnames, templates, track))

    @property
    def label(self) -> str:
        """The name of the pretrained model in messages."""
        return getattr(self.weights, "label", "the base")

    @property
    def quick_gelu(self) -> bool:
        return bool(self.settings.get("quick_gelu", True))

    @cached_property
    def reader(self) -> PictureReader:
        """open_clip's processor: the shorter side resized (bicubic) to the training resolution, the centre cropped."""
        with quiet():
            from transformers import CLIPImageProcessorPil

            side = self._sizes["image_size"]
            processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
        return PictureReader(processor, (3, side, side), self.label)

    @cached_property
    def _named(self) -> dict[str, Tensor]:
        """All tensors of the checkpoint, by open_clip's names."""
        return {name.removeprefix(_PICKLED): self.weights[name] for name in self.weights}

    @property
    def _has_text_tower(self) -> bool:
        return any(name.startswith(_TEXT_BLOCKS) for name in self._named)

    @cached_property
    def _sizes(self) -> dict[str, int]:
        """The vision tower's sizes, from the shapes of its weights."""
        try:
            conv, positions = self._named["visual.conv1.weight"], self._named["visual.positional_embedding"]
            dim = self._named["visual.proj"].shape[1]
        except KeyError as error:
            raise CheckpointError(f"{error} is missing from '{self.label}'; wanted a CLIP ViT of open_clip.") from None
        grid = round((positions.shape[0] - 1) ** 0.5)
        sizes = {"width": conv.shape[0], "patch_size": conv.shape[-1], "image_size": grid * conv.shape[-1]}
        return sizes | {"layers": _count_blocks(self._named, "visual." + _TEXT_BLOCKS), "embed_dim": dim}

    def _build(self, *, with_text: bool) -> Any:
        """open_clip's CLIP of these sizes; without the text tower, one of the smallest sizes stands in for it."""
        try:
            from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ConfigError(
                "family=open_clip takes the open_clip library: pip install 'suture[open_clip]'."
            ) from None
        sizes = dict(self._sizes)
        dim = sizes.pop("embed_dim")
        text = {"context_length": 4, "vocab_size": 4, "width": _HEAD_WIDTH, "heads": 1, "layers": 1}
        if with_text:
            vocabulary, width = self._named["token_embedding.weight"].shape
            text |= {"vocab_size": vocabulary, "width": width, "heads": width // _HEAD_WIDTH}
            text |= {"context_length": self._named["positional_embedding"].shape[0]}
            text |= {"layers": _count_blocks(self._named, _TEXT_BLOCKS)}
        vision = CLIPVisionCfg(**sizes, head_width=_HEAD_WIDTH)
        model = CLIP(dim, vision, CLIPTextCfg(**text), quick_gelu=self.quick_gelu)
        return model.float().eval()

    @cached_property
    def _text_model(self) -> Any:
        model = self._build(with_text=True)
        model.load_state_dict({name: tensor.float() for name, tensor in self._named.items()}, strict=False)
        return model.requires_grad_(False)

    def _encode_text(self, prompts: list[str]) -> Tensor:
        from open_clip import SimpleTokenizer  # pyright: ignore[reportMissingImports]

        length = self._named["positional_embedding"].shape[0]
        return self._text_model.encode_text(SimpleTokenizer(context_length=length)(prompts))

    def _stored_head(self, heads: Mapping[str, str], task: str, classes: int) -> Tensor:
        if task not in heads:
            raise ConfigError(unknown_name("task under modelpool.heads", task, heads))
        head = open_checkpoint(heads[task], label=f"head of {task}")
        weight, bias = head["weight"].float(), head["bias"] if "bias" in head else torch.zeros(1)
        if len(weight) != classes:
            raise CheckpointError(f"'{heads[task]}' has {len(weight)} classes but '{task}' has {classes} class names.")
        if bool(bias.any()):
            raise CheckpointError(f"'{heads[task]}' has a bias that is not zero; a zero-shot head has none.")
        return weight.clone()


def _count_blocks(names: Iterable[str], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)})


FAMILY = OpenClip
