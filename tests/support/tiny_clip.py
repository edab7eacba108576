"""A CLIP of random weights, small enough to be made on the spot, saved as transformers saves one."""

import json
import string
from pathlib import Path

import torch

SIDE = 16
_SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def save_tiny_clip(directory: Path, seed: int = 0, width: int = 16) -> Path:
    """A whole CLIPModel directory: config, weights, tokenizer and processor."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

    letters = string.ascii_lowercase + "."
    vocabulary = {t: i for i, t in enumerate([*letters, *(letter + "</w>" for letter in letters), *_SPECIAL])}
    directory.mkdir(parents=True)
    tower = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    ends = {"bos_token_id": vocabulary[_SPECIAL[0]], "eos_token_id": vocabulary[_SPECIAL[1]]}
    text = {
        "vocab_size": len(vocabulary),
        "max_position_embeddings": 24,
        "pad_token_id": ends["eos_token_id"],
    }
    config = CLIPConfig(
        text_config={**tower, **ends, **text},
        vision_config={**tower, "image_size": SIDE, "patch_size": 4},
        projection_dim=8,
    )
    torch.manual_seed(seed)
    CLIPModel(config).save_pretrained(directory)
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    processor = CLIPProcessor(
        image_processor=CLIPImageProcessorPil(**size), tokenizer=CLIPTokenizer(vocab=vocabulary, merges=[])
    )
    processor.save_pretrained(directory)
    return directory


def edit_json(path: Path, **changes) -> None:
    """Change top-level entries of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
