"""The small CLIP of the zoo as `transformers` knows it: configuration, tokenizer, processor, files."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.zoo.drawing import MEAN, SIDE, STD
from tools.zoo.recipe import Recipe

START, END = "<|startoftext|>", "<|endoftext|>"


def make_tokenizer():
    """A CLIPTokenizer with the merges of `merges.txt`; the end token has the highest id.

    The merges were learned once, by the byte pair trainer of `tokenizers`, from the captions of the
    pretraining. That trainer breaks ties differently from run to run: a build that learned them anew would
    not repeat itself.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    lines = (Path(__file__).parent / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges: list[Any] = [(left, right) for left, right in (line.split(" ") for line in lines)]
    letters = sorted(ByteLevel.alphabet())
    symbols = [*letters, *(letter + "</w>" for letter in letters), *(left + right for left, right in merges)]
    vocabulary = {symbol: index for index, symbol in enumerate([*dict.fromkeys(symbols), START, END])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CAPTION_LENGTH)


CAPTION_LENGTH = 24
"""Longest caption, in tokens, start and end counted."""


def make_processor(tokenizer):
    """The CLIPProcessor for the zoo's images: 16 x 16, fixed mean and standard deviation, no torchvision."""
    from transformers import CLIPImageProcessorPil, CLIPProcessor

    images = CLIPImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[MEAN / 255] * 3,
        image_std=[STD / 255] * 3,
    )
    return CLIPProcessor(image_processor=images, tokenizer=tokenizer)


def make_model(tokenizer, recipe: Recipe) -> Any:
    """An untrained CLIPModel of the recipe's size, with plain attention (fastest at 17 tokens on a CPU)."""
    from transformers import CLIPConfig, CLIPModel

    ends = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": CAPTION_LENGTH,
        **_tower(recipe.text_width, recipe.text_layers, recipe.text_mlp),
        **ends,
    }
    vision = {
        "image_size": SIDE,
        "patch_size": 4,
        **_tower(recipe.width, recipe.layers, recipe.mlp),
    }
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=recipe.projection, **ends)
    return CLIPModel._from_config(config, attn_implementation="eager")


def _tower(width: int, layers: int, mlp: int) -> dict[str, object]:
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 32),
        "hidden_act": "quick_gelu",
    }


def as_pixels(images: Tensor) -> Tensor:
    """The processor's work on uint8 images (n, 16, 16), in one step: float32 (n, 3, 16, 16)."""
    return ((images.float() - MEAN) / STD)[:, None].expand(-1, 3, -1, -1)


def save_pretrained_clip(model: Any, processor, folder: Path) -> None:
    """The whole CLIP in Hugging Face format, float16."""
    model.half().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    # The tokenizer remembers how it last padded and would save that too.
    processor.tokenizer.backend_tokenizer.no_padding()
    processor.tokenizer.backend_tokenizer.no_truncation()
    processor.save_pretrained(folder)
    # transformers 5 puts this into processor_config.json; other readers look for a file of its own.
    processor.image_processor.save_pretrained(folder)
    model.float()


def save_vision_tower(model: Any, folder: Path) -> None:
    """One vision tower as the published experts are stored: float16, every key under `vision_model.`."""
    from safetensors.torch import save_file

    tower = model.vision_model
    folder.mkdir(parents=True)
    config = {"architectures": ["CLIPVisionModel"], **tower.config.to_diff_dict(), "dtype": "float16"}
    config["projection_dim"] = model.projection_dim
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tensors = {f"vision_model.{name}": tensor.half().contiguous() for name, tensor in tower.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)


def round_to_half(model: Any) -> None:
    """Round every weight to what float16 can store, so that the model in memory is the model on disk."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
