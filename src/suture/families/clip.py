"""CLIP as `transformers` saves it: https://arxiv.org/abs/2103.00020.

The vision tower is merged. The text tower, both projections and the logit scale stay the pretrained ones.
Canonical names are those of the vision tower inside a CLIPModel, `vision_model.…`. The published CLIPVisionModels have
this prefix too; those that transformers 5 saves do not.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from suture.core.head import Head
from suture.core.progress import Track, untracked
from suture.errors import CheckpointError, one_line
from suture.families.shared.base import Encoder, Family
from suture.families.shared.pictures import PictureReader, Standardise, quiet
from suture.families.shared.zero_shot import cached, without_templates, zero_shot_head
from suture.storage.cache import digest
from suture.tasks.base import Images, Task

_VISION, _TEXT = "vision_model.", "text_model."
_BARE = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")
_TOKENIZER = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)


class ClipEncoder(Encoder):
    """Vision tower and projection: pixels (B, 3, H, W) → features (B, D), not normalised.

    Pixels are float32, as the processor makes them, or uint8, as decoded; uint8 is standardised here, on the device.
    """

    def __init__(self, tower: nn.Module, projection: nn.Module, standardise: Standardise):
        super().__init__()
        self.vision_model = tower
        self.visual_projection = projection
        self.standardise = standardise

    def forward(self, pixels: Tensor) -> Tensor:
        if pixels.dtype == torch.uint8:
            pixels = self.standardise(pixels)
        return self.visual_projection(self.vision_model(pixel_values=pixels).pooler_output)

    def load(self, state: Mapping[str, Tensor]) -> "ClipEncoder":
        """Copy in the weights of a vision tower, with the prefix or without; `CheckpointError` if it does not fit."""
        tower = {name: state[key] for name, key in Clip.canonical_names(state).items()}
        _copy_into(_parameters(self.vision_model, _VISION), tower, state)
        return self


class Clip(Family):
    """A CLIPModel directory: config.json, weights, tokenizer and image processor."""

    name = "clip"
    architectures = ("CLIPModel", "CLIPVisionModel", "CLIPVisionModelWithProjection")

    @staticmethod
    def canonical_names(names: Iterable[str]) -> dict[str, str]:
        """`vision_model.…` → stored name, for the vision tower's tensors; integer position ids are left out.

        >>> Clip.canonical_names(["pre_layrnorm.bias", "embeddings.position_ids"])
        {'vision_model.pre_layrnorm.bias': 'pre_layrnorm.bias'}
        >>> Clip.canonical_names(["vision_model.pre_layrnorm.bias", "text_model.final_layer_norm.bias"])
        {'vision_model.pre_layrnorm.bias': 'vision_model.pre_layrnorm.bias'}
        """
        names = [name for name in names if not name.endswith("position_ids")]
        prefixed = {name: name for name in names if name.startswith(_VISION)}
        if prefixed or any(name.startswith((_TEXT, "embeddings.token_embedding")) for name in names):
            return prefixed
        return {_VISION + name: name for name in names if name.startswith(_BARE)}

    def encoder(self, state: Mapping[str, Tensor] | None = None) -> ClipEncoder:
        with quiet():
            from transformers import CLIPVisionModel

            tower = _build(CLIPVisionModel, self.config.vision_config, "vision_model")
        projection = _linear(self.weights, "visual_projection.weight", self.directory)
        encoder = ClipEncoder(tower, projection, self.reader.standardise()).eval().requires_grad_(False)
        return encoder.load(self.weights if state is None else state)

    @cached_property
    def reader(self) -> PictureReader:
        """The model's image processor, which turns pictures into pixels."""
        side = self.config.vision_config.image_size
        return PictureReader(self.processor, (3, side, side), str(self.directory))

    def preprocess(self, images: Images, track: Track = untracked, description: str = "Decoding") -> Tensor:
        """The images as `transformers` prepares them: decoded and standardised, float32 (N, 3, H, W)."""
        return self.reader.standardise()(self.decode(images, track, description))

    def head(self, task: Task, track: Track = untracked) -> Head:
        """The zero-shot head: cosines to the class directions, times the model's logit scale."""
        directions = self.directions(task.classnames, task.templates, track)
        return Head(directions, scale=self.logit_scale, normalised=True)

    def problems(self, task: Task) -> list[str]:
        return [*super().problems(task), *without_templates(task)]

    def directions(self, classnames: Sequence[str], templates: Sequence[str], track: Track = untracked) -> Tensor:
        """Zero-shot class directions (C, D) from the pretrained text tower; cached on disk by content."""
        key = digest({}, [], "clip head", self._text_digest, list(classnames), list(templates))
        return cached(key, lambda: zero_shot_head(self._encode_text, classnames, templates, track))

    @cached_property
    def logit_scale(self) -> float:
        """The factor that turns cosine similarities into logits."""
        return _tensor(self.weights, "logit_scale", self.directory).float().exp().item()

    def save(self, state: Mapping[str, Tensor], out: Path) -> None:
        """Write a CLIPModel directory: the base with its vision tower replaced, in the base's names and dtypes."""
        from suture.checkpoints import save_checkpoint

        tensors = self.full_state(state)
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        save_checkpoint(tensors, out / "model.safetensors", metadata={"format": "pt"})
        self.complete(out)

    def full_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every tensor of the base, with the vision tower's replaced by the merged ones."""
        merged = {name: state[key] for name, key in self.canonical_names(state).items()}
        stored = self.canonical_names(self.weights)
        if unknown := sorted(merged.keys() - stored.keys()):
            raise CheckpointError(f"'{unknown[0]}' is in the merged model but not in '{self.directory}'.")
        tensors = dict(self.weights.items())
        for name, tensor in merged.items():
            base = tensors[stored[name]]
            if tensor.shape != base.shape:
                raise CheckpointError(_wrong_shape(name, tensor, base))
            tensors[stored[name]] = tensor.detach().to(base.dtype)
        return tensors

    @cached_property
    def config(self) -> Any:
        """The CLIPConfig; raises `CheckpointError` when the directory holds another kind of model."""
        path = self.directory / "config.json"
        try:
            settings = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            reason = one_line(error)
            raise CheckpointError(f"'{path}' cannot be read ({reason}); wanted a CLIPModel directory.") from error
        if settings.get("model_type") != "clip":
            raise CheckpointError(
                f"'{path}' describes a model of type {settings.get('model_type')!r}, wanted 'clip': the "
                f"pretrained model must be a whole CLIPModel, whose text tower makes the heads."
            )
        with quiet():
            from transformers import CLIPConfig

            try:
                return CLIPConfig.from_dict(settings)
            except Exception as error:  # the library raises a different class for almost every setting
                raise CheckpointError(f"'{path}' describes no valid CLIP: {one_line(error)}") from error

    @cached_property
    def processor(self) -> Any:
        """The model's image processor, the variant that works on Pillow images."""
        with quiet():
            from transformers import CLIPImageProcessorPil

            files = "preprocessor_config.json or processor_config.json"
            return _from_disk(CLIPImageProcessorPil, self.directory, files)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer; raises `CheckpointError` when it does not belong to the text tower."""
        files = "tokenizer.json, or vocab.json and merges.txt"
        if not any((self.directory / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise CheckpointError(f"'{self.directory}' has no usable {files}. Remedy: put back the model's tokenizer.")
        with quiet():
            from transformers import AutoTokenizer

            tokenizer = _from_disk(AutoTokenizer, self.directory, files)
        _check_tokenizer(tokenizer, self.config.text_config, self.directory)
        return tokenizer

    @cached_property
    def _text_weights(self) -> dict[str, Tensor]:
        prefixes = (_TEXT, "text_projection.")
        names = [name for name in self.weights if name.startswith(prefixes) and not name.endswith("position_ids")]
        return {name: self.weights[name] for name in names}

    @cached_property
    def _text_digest(self) -> str:
        files = [self.directory / name for name in _TOKENIZER if (self.directory / name).is_file()]
        settings = {k: v for k, v in self.config.text_config.to_dict().items() if k != "transformers_version"}
        return digest(self._text_weights, files, json.loads(json.dumps(settings, default=str)))

    @cached_property
    def _text_tower(self) -> nn.Module:
        with quiet():
            from transformers import CLIPTextModel

            tower = _build(CLIPTextModel, self.config.text_config, "text_model")
        weights = {name: tensor for name, tensor in self._text_weights.items() if name.startswith(_TEXT)}
        _copy_into(_parameters(tower, _TEXT), weights, self.weights)
        return tower.eval().requires_grad_(False)

    def _encode_text(self, prompts: list[str]) -> Tensor:
        length = self.config.text_config.max_position_embeddings
        options = {"padding": True, "truncation": True, "max_length": length, "return_tensors": "pt"}
        tokens = self.tokenizer(prompts, **options)
        out = self._text_tower(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return out.pooler_output @ _tensor(self.weights, "text_projection.weight", self.directory).float().T


def _build(kind: Any, config: Any, inner: str) -> nn.Module:
    """The bare tower, float32, with uninitialised weights: no time is spent on random ones."""
    with torch.device("meta"):
        model = kind(config)
    tower = getattr(model, inner, model)  # transformers 4 wraps the tower once more
    tower.to_empty(device="cpu")
    for name, buffer in tower.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1]))
    return tower.float()


def _check_tokenizer(tokenizer: Any, config: Any, directory: Path) -> None:
    if len(tokenizer) > config.vocab_size:
        raise CheckpointError(
            f"The tokenizer of '{directory}' has {len(tokenizer)} tokens but the text tower "
            f"{config.vocab_size}; they belong to different models."
        )
    # The tower pools at its end token, or at the first token if there is none. 2 stands for the highest id.
    if config.eos_token_id not in (2, tokenizer.eos_token_id):
        raise CheckpointError(
            f"The tokenizer of '{directory}' ends texts with token {tokenizer.eos_token_id} but the text "
            f"tower looks for {config.eos_token_id}. Remedy: correct eos_token_id in config.json."
        )


def _parameters(module: nn.Module, prefix: str) -> dict[str, nn.Parameter]:
    return {prefix + name: parameter for name, parameter in module.named_parameters()}


def _copy_into(parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor], source: object) -> None:
    """Copy every parameter from `state` after checking all of them; raises `CheckpointError`."""
    label = repr(getattr(source, "label", "the model"))
    if missing := [name for name in parameters if name not in state]:
        raise CheckpointError(
            f"'{missing[0]}' is missing from {label} ({len(missing)} of {len(parameters)} tensors are); "
            f"wanted a CLIP of the pretrained model's architecture."
        )
    if extra := sorted(state.keys() - parameters.keys()):
        raise CheckpointError(f"'{extra[0]}' in {label} is not part of the pretrained model's architecture.")
    for name, parameter in parameters.items():
        if state[name].shape != parameter.shape:
            raise CheckpointError(_wrong_shape(name, state[name], parameter))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def _linear(weights: Mapping[str, Tensor], name: str, directory: Path) -> nn.Linear:
    weight = _tensor(weights, name, directory)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        linear.weight.copy_(weight)
    return linear


def _tensor(weights: Mapping[str, Tensor], name: str, directory: Path) -> Tensor:
    if name not in weights:
        raise CheckpointError(f"'{name}' is missing from '{directory}'; wanted a whole CLIPModel.")
    return weights[name]


def _from_disk(kind: Any, directory: Path, files: str) -> Any:
    try:
        return kind.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{directory}' has no usable {files}: {one_line(error)}") from error


def _wrong_shape(name: str, tensor: Tensor, expected: Tensor) -> str:
    return f"'{name}' has shape {tuple(tensor.shape)} but {tuple(expected.shape)} in the pretrained model."


FAMILY = Clip
