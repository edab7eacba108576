"""real3: experts for three tasks of real images, from data on this machine: clothing, handwriting, photographs.

They are fine-tuned from glyphs8's CLIP, which has seen drawn glyphs only: captions of clothing and photographs are
new to it.
"""

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from suture import tasks as sources
from suture.checkpoints import open_checkpoint
from suture.core.progress import bar
from suture.core.random import generator_for
from suture.errors import ConfigError, DataError
from suture.storage.addresses import zoo_path
from suture.tasks import Images, Split, Task
from tools.zoo import drawing
from tools.zoo.building import Labelled, ZooTask, require, save_data, train_experts
from tools.zoo.digits import handwritten_digits
from tools.zoo.recipe import Recipe

RECIPE = Recipe(finetuning_batch=64, train_images=12_000, test_images=2_000)
TEMPLATES = ("a picture of {}", "a small image of {}")

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""The path of Debian's package."""

CLOTHING = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip

PHOTOGRAPHS = {
    "brick": "brick.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "cat": "chelsea.png",
    "coins": "coins.png",
    "galaxies": "hubble_deep_field.jpg",
    "tissue": "ihc.png",
    "print": "page.png",
}
"""A class and the one photograph, among those inside scikit-image, that its patches are cut from."""

PATCH = 64
"""Side of a patch, in the photograph's pixels."""

LEARNED = 0.6
"""Patches to learn from lie in this share of a photograph, from the left; patches to test on, in the rest."""


def build(folder: Path, *, seed: int, recipe: Recipe | None = None, data: str | Path | None = None) -> None:
    """Fine-tune real3 into `folder`: `experts/TASK` and `data/TASK`.

    `data` is a folder of Fashion-MNIST, by default Debian's: IDX files, or an image folder with the class
    names of `CLOTHING`. Raises `DataError` where there is none, `ConfigError` without scikit-learn or
    scikit-image.
    """
    recipe = recipe or RECIPE
    require("skimage", "scikit-image", "photographs")
    digits = handwritten_digits(recipe, seed)
    tasks = [_clothing(data, recipe, seed), digits, _photographs(recipe, seed)]
    save_data(tasks, folder / "data")
    train_experts(tasks, *_pretrained(), recipe, seed, folder / "experts")


def _pretrained() -> tuple[Any, object]:
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = zoo_path("zoo:glyphs8/pretrained")
    model = CLIPModel(CLIPConfig.from_pretrained(folder))
    model.load_state_dict(dict(open_checkpoint(folder)))
    return model.float(), CLIPTokenizer.from_pretrained(folder)


def _clothing(data: str | Path | None, recipe: Recipe, seed: int) -> ZooTask:
    if data is None and not FASHION_MNIST.is_dir():
        raise DataError(
            f"Fashion-MNIST is not in {FASHION_MNIST}. Remedy: apt-get install dataset-fashion-mnist, or name a "
            "folder of its IDX files: --data DIR."
        )
    task = Task("clothing", str(data or FASHION_MNIST), CLOTHING, TEMPLATES)
    found: dict[Split, Any] = {split: sources.load(task, split) for split in ("train", "test")}
    train = _some(found["train"], recipe.train_images, generator_for(seed, "clothing/train"))
    test = _some(found["test"], recipe.test_images, generator_for(seed, "clothing/t10k"))
    return _task("clothing", CLOTHING, train, test, recipe)


def _some(images: Images, count: int, generator: torch.Generator) -> Labelled:
    """That many images, at most, chosen and ordered at random: grey, standardised."""
    members = torch.randperm(len(images), generator=generator)[:count]
    with bar("Reading clothing", len(members)) as advance:
        pages = []
        for member in members.tolist():
            picture = images.pictures(member, member + 1)[0].convert("L").resize((drawing.PAGE, drawing.PAGE))
            pages.append(_grey(picture))
            advance(1)
    return drawing.standardise(torch.stack(pages)), images.labels[members]


def _photographs(recipe: Recipe, seed: int) -> ZooTask:
    """The photograph that a patch is from; no pixel is in patches of both splits."""
    from PIL import Image

    package = importlib.util.find_spec("skimage")
    assert package is not None
    assert package.origin is not None
    folder = Path(package.origin).parent / "data"
    missing = [file for file in PHOTOGRAPHS.values() if not (folder / file).is_file()]
    if missing:
        raise ConfigError(f"This scikit-image has no {missing[0]} inside. Remedy: pip install -U scikit-image.")
    pages = [_grey(Image.open(folder / file).convert("L")) for file in PHOTOGRAPHS.values()]
    borders = [round(page.shape[1] * LEARNED) for page in pages]
    left = [page[:, :border] for page, border in zip(pages, borders, strict=True)]
    right = [page[:, border:] for page, border in zip(pages, borders, strict=True)]
    train = _patches(left, min(recipe.train_images, 4000), generator_for(seed, "photographs/train"))
    test = _patches(right, min(recipe.test_images, 1000), generator_for(seed, "photographs/t10k"))
    return _task("photographs", tuple(PHOTOGRAPHS), train, test, recipe)


def _patches(pages: list[Tensor], count: int, generator: torch.Generator) -> Labelled:
    """Patches at random places, classes as equal as can be, shuffled."""
    labels = torch.arange(count) % len(pages)
    labels = labels[torch.randperm(count, generator=generator)]
    place = torch.rand(count, 2, generator=generator)
    patches = [_patch(pages[label], *at) for label, at in zip(labels.tolist(), place.tolist(), strict=True)]
    halves = torch.nn.functional.avg_pool2d(torch.stack(patches)[:, None], PATCH // drawing.PAGE)[:, 0]
    return drawing.standardise(halves), labels


def _patch(page: Tensor, down: float, across: float) -> Tensor:
    top, left = (int(share * (size - PATCH + 1)) for share, size in zip((down, across), page.shape, strict=True))
    return page[top : top + PATCH, left : left + PATCH]


def _grey(picture: Any) -> Tensor:
    return torch.from_numpy(np.array(picture)).float() / 255


def _task(name: str, classnames: Iterable[str], train: Labelled, test: Labelled, recipe: Recipe) -> ZooTask:
    images, labels = train

    def draw(generator: torch.Generator) -> Labelled:
        members = torch.randint(len(labels), (recipe.finetuning_batch,), generator=generator)
        return images[members], labels[members]

    return ZooTask(name, tuple(classnames), TEMPLATES, train, test, draw)
