"""glyphs8: a small CLIP pretrained on captioned glyphs, and experts for seven scripts and for handwriting."""

from pathlib import Path
from typing import Any

from suture.core.progress import bar
from suture.core.random import generator_for
from tools.zoo import alphabets, clip_files, training
from tools.zoo.building import ZooTask, save_data, train_experts
from tools.zoo.digits import handwritten_digits
from tools.zoo.glyphs import TaskGlyphs
from tools.zoo.recipe import Recipe


def build(folder: Path, *, seed: int, recipe: Recipe | None = None) -> None:
    """Train glyphs8 into `folder`: `pretrained`, `experts/TASK` and `data/TASK`."""
    recipe = recipe or Recipe()
    digits = handwritten_digits(recipe, seed)
    tasks = [*(_rendered(task, recipe, seed) for task in alphabets.GLYPH_TASKS), digits]
    save_data(tasks, folder / "data")
    model, tokenizer = _pretrained(folder / "pretrained", recipe, seed)
    train_experts(tasks, model, tokenizer, recipe, seed, folder / "experts")


def _rendered(task: alphabets.GlyphTask, recipe: Recipe, seed: int) -> ZooTask:
    glyphs = TaskGlyphs(task, recipe)
    train = glyphs.split(recipe.train_images, generator_for(seed, f"{task.name}/train"))
    test = glyphs.split(recipe.test_images, generator_for(seed, f"{task.name}/t10k"))
    return ZooTask(task.name, task.classnames, alphabets.TASK_TEMPLATES, train, test, glyphs.draw)


def _pretrained(folder: Path, recipe: Recipe, seed: int) -> tuple[Any, object]:
    tokenizer = clip_files.make_tokenizer()
    model = clip_files.make_model(tokenizer, recipe)
    with bar("Pretraining", recipe.pretraining_steps) as advance:
        training.pretrain(model, tokenizer, recipe, seed, lambda: advance(1))
    clip_files.save_pretrained_clip(model, clip_files.make_processor(tokenizer), folder)
    return model, tokenizer
