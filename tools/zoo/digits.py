"""scikit-learn's handwritten digits as a task: 8 x 8 pixels doubled to 16 x 16, bent a little when trained on."""

from typing import Any

import torch
from torch.nn import functional as F

from suture.core.random import generator_for
from tools.zoo import alphabets, drawing
from tools.zoo.building import Labelled, ZooTask, require
from tools.zoo.recipe import Recipe


def handwritten_digits(recipe: Recipe, seed: int) -> ZooTask:
    """The task "digits"; raises `ConfigError` without scikit-learn."""
    require("sklearn", "scikit-learn", "digits")
    from sklearn.datasets import load_digits

    loaded: Any = load_digits()
    pages = torch.from_numpy(loaded.images).float()[:, None] / 16
    pages = F.interpolate(pages, size=(drawing.PAGE, drawing.PAGE), mode="bicubic")[:, 0].clamp(0, 1)
    labels = torch.from_numpy(loaded.target).long()
    order = torch.randperm(len(labels), generator=generator_for(seed, "digits/split"))
    tests = min(recipe.test_images, len(order) - 900)
    test, train = order[:tests], order[tests:][: recipe.train_images]

    def draw(generator: torch.Generator) -> Labelled:
        members = train[torch.randint(len(train), (recipe.finetuning_batch,), generator=generator)]
        padded = F.pad(pages[members], [(drawing.CANVAS - drawing.PAGE) // 2] * 4)
        return drawing.standardise(drawing.bend(padded, 0.5, generator)), labels[members]

    split = lambda members: (drawing.standardise(pages[members]), labels[members])
    return ZooTask(
        alphabets.DIGITS, alphabets.DIGIT_CLASSNAMES, alphabets.TASK_TEMPLATES, split(train), split(test), draw
    )
