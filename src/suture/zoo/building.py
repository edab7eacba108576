"""Build glyphs8: data, pretraining, eight experts; into a folder that appears only when it is complete."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from suture.errors import ConfigError, OutputError
from suture.progress import bar
from suture.randomness import generator_for
from suture.zoo import alphabets, clip_files, training
from suture.zoo.idx import save_split
from suture.zoo.recipe import Recipe

Batches = Callable[[torch.Generator], tuple[Tensor, Tensor]]


def build_glyphs8(out: Path, seed: int = 0, recipe: Recipe | None = None) -> Path:
    """Train glyphs8 into the new folder `out`: `pretrained`, `experts/TASK` and `data/TASK`."""
    recipe = recipe or Recipe()
    _require_scikit_learn()
    with _complete_or_absent(out) as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        batches = _write_data(folder / "data", recipe, seed)
        model, tokenizer = _pretrained(folder / "pretrained", recipe, seed)
        for task, stream in batches.items():
            head = training.zero_shot_head(model, tokenizer, alphabets.classnames_of(task))
            generator = generator_for(seed, f"{task}/ft")
            with bar(f"Fine-tuning {task}", recipe.finetuning_steps) as advance:
                expert = training.finetune(model, head, stream, recipe, generator, lambda: advance(1))
            clip_files.save_vision_tower(expert, folder / "experts" / task)
    return out


def _write_data(folder: Path, recipe: Recipe, seed: int) -> dict[str, Batches]:
    """Write every task's splits; give the stream of training batches of each."""
    batches: dict[str, Batches] = {}
    for task in alphabets.GLYPH_TASKS:
        glyphs = training.TaskGlyphs(task, recipe)
        for prefix, count in (("train", recipe.train_images), ("t10k", recipe.test_images)):
            generator = generator_for(seed, f"{task.name}/{prefix}")
            save_split(folder / task.name, prefix, *glyphs.split(count, generator))
        batches[task.name] = glyphs.draw
    digits = training.HandwrittenDigits(recipe, seed)
    save_split(folder / alphabets.DIGITS, "train", *digits.split(digits.train))
    save_split(folder / alphabets.DIGITS, "t10k", *digits.split(digits.test))
    batches[alphabets.DIGITS] = digits.draw
    return batches


def _pretrained(folder: Path, recipe: Recipe, seed: int) -> tuple[Any, object]:
    tokenizer = clip_files.make_tokenizer()
    model = clip_files.make_model(tokenizer, recipe)
    with bar("Pretraining", recipe.pretraining_steps) as advance:
        training.pretrain(model, tokenizer, recipe, seed, lambda: advance(1))
    clip_files.save_pretrained_clip(model, clip_files.make_processor(tokenizer), folder)
    return model, tokenizer


def _require_scikit_learn() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise ConfigError("Building glyphs8 needs scikit-learn, for its digits: pip install 'suture[zoo]'.") from None


@contextmanager
def _complete_or_absent(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name at the end and is removed on an error."""
    if out.exists():
        raise OutputError(f"{out} exists. Remedy: name a new folder, or remove this one.")
    folder = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        folder.mkdir(parents=True)
        yield folder
        folder.rename(out)
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror}.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
