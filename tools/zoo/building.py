"""Build a zoo: data, experts and what it is fine-tuned from, into a folder that appears only when it is complete.

Each zoo is one module of `tools.zoo.builders`; this module holds their common parts.
"""

import importlib
import importlib.util
import inspect
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from suture.core.progress import bar
from suture.core.random import generator_for
from suture.errors import ConfigError, OutputError, unknown_name
from suture.storage.addresses import home, installed
from tools.zoo import clip_files, training
from tools.zoo.idx import save_split
from tools.zoo.recipe import Recipe

Labelled = tuple[Tensor, Tensor]
"""uint8 images (n, 16, 16) and their labels (n,)."""


@dataclass(frozen=True, eq=False)
class ZooTask:
    """One task of a zoo: its words, its two splits, and what gives batches for its expert to learn from."""

    name: str
    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    train: Labelled
    test: Labelled
    draw: Callable[[torch.Generator], Labelled]


def build(name: str, output: Path | None = None, seed: int = 0, **options: Any) -> Path:
    """Train a zoo into the new folder `output`, by default where suture looks for it; returns the folder.

    The same seed and number of threads give the same bits on one machine. `options` are those of the zoo's builder
    (`recipe`, `data`). Raises `ConfigError` for an unknown name or option, `DataError` for data that is missing, and
    `OutputError` if the folder exists.
    """
    if name not in buildable():
        raise ConfigError(unknown_name("zoo", name, buildable()))
    if output is None and installed(name):
        raise ConfigError(f"{name} is installed. Remedy: to build it again, name a folder: --output DIR")
    builder = importlib.import_module(f"tools.zoo.builders.{name}").build
    known = [option for option in inspect.signature(builder).parameters if option not in ("folder", "seed")]
    for option in options:
        if option not in known:
            raise ConfigError(unknown_name(f"option of {name}", option, known))
    output = Path(output or home(name))
    with _complete_or_absent(output) as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        builder(folder, seed=seed, **options)
    return output


def buildable() -> list[str]:
    """The zoos that can be built: every module of `tools.zoo.builders`."""
    return sorted(file.stem for file in (Path(__file__).parent / "builders").glob("[a-z]*.py"))


def save_data(tasks: Iterable[ZooTask], folder: Path) -> None:
    """Write the splits of every task to `folder/TASK`."""
    for task in tasks:
        save_split(folder / task.name, "train", *task.train)
        save_split(folder / task.name, "t10k", *task.test)


def train_experts(tasks: Iterable[ZooTask], model: Any, tokenizer, recipe: Recipe, seed: int, folder: Path) -> None:
    """Fine-tune the vision tower of a CLIPModel for every task, into `folder/TASK`."""
    for task in tasks:
        head = training.zero_shot_head(model, tokenizer, task.classnames, task.templates)
        generator = generator_for(seed, f"{task.name}/ft")
        with bar(f"Fine-tuning {task.name}", recipe.finetuning_steps) as advance:
            expert = training.finetune(model, head, task.draw, recipe, generator, lambda: advance(1))
        clip_files.save_vision_tower(expert, folder / task.name)


def require(module: str, package: str, purpose: str) -> None:
    """Raise `ConfigError` if a package of the `zoo` extra is not installed."""
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"Building this zoo needs {package}, for its {purpose}: pip install {package}.")


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
