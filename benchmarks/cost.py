"""Time and memory of every kind of method by the size of the model, as a table.

    python benchmarks/cost.py [--folder DIR] [--sizes 5M 30M 90M] [--models 4] [--only NAME ...]

The models are CLIP vision towers of random weights with pictures of 224 × 224 in patches of 32 (50 tokens), in float32
and in files. Merges go from files to a file. A step of a method that learns is the difference between `_LONG` and
`_SHORT` steps, divided by their number. Every measurement is a process of its own on one thread: processor seconds,
which a busy machine disturbs less than wall time, and the peak of anonymous memory beyond what the imports took.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from towers import embeds, tower
from watching import measure

import suture
from suture.checkpoints import allocate_checkpoint
from suture.merging.merge import merge_task_vectors
from suture.merging.registry import get_method
from suture.merging.task_vectors import open_task_vectors

SIZES = {"5M": (256, 6), "30M": (512, 9), "90M": (768, 12)}  # width and number of layers
STATIC = ("simple_average", "task_arithmetic", "ties_merging", "dare", "tsv_m", "iso_c", "aswudi")
INPUTS, BATCH, CLASSES = 32, 8, 10  # inputs of each task, of each step of it, and outputs of the head
_SHORT, _LONG = 1, 3


class Classifier(nn.Module):
    """A tower with a fixed head: pictures → logits."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.tower = tower(0, width, layers)
        self.head = torch.randn(512, CLASSES, generator=torch.Generator().manual_seed(0))

    def forward(self, pixel_values: Tensor) -> Tensor:
        return embeds(self.tower, pixel_values) @ self.head


class Problem:
    """The files of a size, its experts one at a time, and unlabelled inputs."""

    def __init__(self, folder: Path, size: str):
        self.folder, self.size = folder, SIZES[size]
        self.base = folder / "base.safetensors"
        self.models = {path.stem: path for path in sorted(folder.glob("model_*.safetensors"))}

    def inputs(self) -> dict[str, Tensor]:
        draw = lambda seed: torch.randn(INPUTS, 3, 224, 224, generator=torch.Generator().manual_seed(seed))
        return {task: draw(seed) for seed, task in enumerate(self.models)}

    def expert(self) -> Callable[[str], nn.Module]:
        """A function from a task to its expert, which loads each into the same module."""
        module = tower(0, *self.size)

        def load(task: str) -> nn.Module:
            module.load_state_dict(load_file(self.models[task]))
            return module

        return load


def make(folder: Path, size: str, models: int) -> None:
    """The files of a size: a base and experts that differ from it by small noise."""
    save_file(tower(0, *SIZES[size]).state_dict(), folder / "base.safetensors")
    for i in range(models):
        save_file(tower(i + 1, *SIZES[size]).state_dict(), folder / f"model_{i}.safetensors")


def merge(problem: Problem, method: str) -> None:
    chosen = get_method(method)
    vectors = open_task_vectors(problem.base, problem.models)
    with allocate_checkpoint(vectors.specs, problem.folder / "merged.safetensors") as out:
        merge_task_vectors(vectors, chosen, chosen.knobs.validate({}), out)


def adamerging(problem: Problem, steps: int) -> None:
    named = lambda path: {f"tower.{name}": tensor for name, tensor in suture.open_checkpoint(path).items()}
    batches = {task: list(inputs.split(BATCH)) for task, inputs in problem.inputs().items()}
    experts = {task: named(path) for task, path in problem.models.items()}
    suture.adapt(Classifier(*problem.size), named(problem.base), experts, batches, granularity="layer", max_steps=steps)


def repair(problem: Problem, kind: str, steps: int | None = None) -> None:
    options: dict[str, Any] = {} if steps is None else {"steps": steps, "batch_size": BATCH}
    options |= {"base": suture.open_checkpoint(problem.base)} if kind in ("calibrate", "distil") else {}
    suture.repair(tower(0, *problem.size), problem.expert(), problem.inputs(), kind, forward=embeds, **options)


#: Row → its work, or the work of so many steps, of which the cost of one is taken.
WORK: Mapping[str, tuple[Callable[..., None], bool]] = {
    **{name: (partial(merge, method=name), False) for name in STATIC},
    "AdaMerging, a step": (adamerging, True),
    "repair=calibrate": (partial(repair, kind="calibrate"), False),
    "repair=final, 1,000 steps": (partial(repair, kind="final", steps=1000), False),
    "repair=deep, a step": (partial(repair, kind="deep"), True),
    "repair=distil, a step": (partial(repair, kind="distil"), True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--sizes", nargs="*", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--only", nargs="*", choices=list(WORK), default=list(WORK))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        name, size = options.one
        steps = {} if options.steps is None else {"steps": options.steps}
        if name not in STATIC:
            tower(0, 64, 1)  # imports transformers, whose memory does not count
        print(json.dumps(measure(partial(WORK[name][0], Problem(options.folder, size), **steps))))
        return
    table = {size: in_size(size, options) for size in options.sizes}
    print(f"{options.models} models; processor seconds and peak memory on one thread; {INPUTS} inputs of each task")
    print(f"{'':27s}" + "".join(f"{size:>22s}" for size in table))
    for name in options.only:
        cells = (f"{used:12.1f} s {memory / 1e6:5.0f} MB" for used, memory in (table[s][name] for s in table))
        print(f"{name:27s}" + "".join(f"{cell:>22s}" for cell in cells))


def in_size(size: str, options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Row → (processor seconds, bytes), for models of one size."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        make(Path(folder), size, options.models)
        return {name: cost(name, size, folder) for name in options.only}


def cost(name: str, size: str, folder: str) -> tuple[float, float]:
    if not WORK[name][1]:
        result = in_process(name, size, folder)
        return result["processor"], result["memory"]
    short, long = (in_process(name, size, folder, "--steps", str(steps)) for steps in (_SHORT, _LONG))
    return (long["processor"] - short["processor"]) / (_LONG - _SHORT), long["memory"]


def in_process(name: str, size: str, folder: str, *more: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--folder", folder, "--one", name, size, *more]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    print(f"# {size} {name} {' '.join(more)}: {done.stdout.strip()}", file=sys.stderr, flush=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
