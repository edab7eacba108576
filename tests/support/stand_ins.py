"""A hub's cache on disk with tiny models and data sets under the published names, in the published formats."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tiny_clip import save_tiny_clip

from suture import tasks
from suture.checkpoints import open_checkpoint, save_checkpoint

EIGHT = ("sun397", "stanford-cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd")
IMAGES = 24


def build(cache: Path, *, models: tuple[str, ...] = EIGHT, data: tuple[str, ...] = EIGHT) -> Path:
    """CLIP ViT-B/32 and its fine-tunes, LoRA adapters of ViT-B/16, and the tasks' data sets."""
    base = save_tiny_clip(entry(cache, "models", "openai/clip-vit-base-patch32"))
    for seed, task in enumerate(models):
        folder = entry(cache, "models", f"tanganke/clip-vit-base-patch32_{task}")
        folder.mkdir(parents=True)
        save_tower(base, folder, seed)
    for seed, task in enumerate(data):
        save_data(cache, task, seed)
    return cache


def entry(cache: Path, kind: str, name: str) -> Path:
    """The folder that a repository's files go to; its only revision is called main."""
    repository = cache / f"{kind}--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    return repository / "snapshots" / ("0" * 40)


def save_tower(base: Path, folder: Path, seed: int) -> None:
    """A fine-tuned vision tower alone, as a CLIPVisionModel is published."""
    generator = torch.Generator().manual_seed(seed)
    tower = {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in open_checkpoint(base).items()
        if name.startswith("vision_model.") and tensor.is_floating_point()
    }
    save_checkpoint(tower, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "clip_vision_model"}')


def save_data(cache: Path, task: str, seed: int) -> None:
    """Parquet files of both splits, with the task's own words for columns, subset and splits."""
    import datasets

    words = tasks.known(task)
    folder = entry(cache, "datasets", words["source"]) / words.get("subset", "data")
    folder.mkdir(parents=True)
    names = [str(name) for name in words.get("labels", words["classnames"])]
    image, label = words.get("image_column", "image"), words.get("label_column", "label")
    features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=names)})
    pixels = np.random.default_rng(seed).integers(0, 256, (IMAGES, 20, 20, 3), dtype=np.uint8)
    columns = {image: [Image.fromarray(p) for p in pixels], label: [i % len(names) for i in range(IMAGES)]}
    for split in ("train", words.get("splits", {}).get("test", "test")):
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
