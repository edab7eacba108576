"""The size of the zoo's CLIP and the length of its training. The shipped files were made with the defaults."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Sizes, steps and learning rates of one zoo."""

    width: int = 192
    layers: int = 4
    mlp: int = 576
    text_width: int = 128
    text_layers: int = 2
    text_mlp: int = 512
    projection: int = 128

    pretraining_steps: int = 2000
    pretraining_batch: int = 256
    pretraining_rate: float = 2e-3
    pretraining_bend: float = 1.0
    spoiled_share: float = 0.3
    spoiled_strength: float = 0.5

    finetuning_steps: int = 300
    finetuning_batch: int = 128
    finetuning_rate: float = 2e-4
    finetuning_pull: float = 0.0
    task_bend: float = 1.1

    train_images: int = 1500
    test_images: int = 1000


MINIATURE = Recipe(
    width=32, layers=1, mlp=64, text_width=32, text_layers=1, text_mlp=64, projection=16,
    pretraining_steps=3, pretraining_batch=16, finetuning_steps=2, finetuning_batch=8,
    train_images=60, test_images=40,
)  # fmt: skip
"""A zoo that learns nothing but is built in seconds, for tests."""
