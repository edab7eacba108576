"""AdaMerging on the zoo: which objective, and from which coefficients. All of it on unlabelled inputs.

    python benchmarks/adamerging_zoo.py [--folder DIR] [--threads N] [--kinds …] [--objectives …]

First the learning rate of each objective is chosen on the TRAINING split: layer-wise, from 0.3, 50 steps of the fast
schedule on the inputs from the 251st on, scored on the first 250 of each task. Then every combination is adapted to the
unlabelled test inputs, 50 fast steps, and scored on the test split. `--folder` keeps what has been learned, so that a
run that was ended goes on, and parts may be run side by side.
"""

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from suture import merge
from suture.adaptation import adapt, layout, load_coefficients, save_coefficients
from suture.core.batches import ShuffledBatches
from suture.evaluation import TaskInputs, evaluate_row, evaluation_set
from suture.pipeline.config import compose
from suture.pipeline.models import Models, open_models
from suture.pipeline.settings import Settings
from suture.tasks import Task

STEPS, RATES, SCORED = 50, (1e-3, 3e-3), 250
OBJECTIVES = ("entropy", "expert_cross_entropy", "expert_feature_l1")
METHODS = {False: "task_arithmetic", True: "ties_merging"}  # where plain and ++ start
KINDS = {
    "task-wise": {"granularity": "task"},
    "layer-wise": {"granularity": "layer"},
    "task-wise ++": {"granularity": "task", "plus_plus": True},
    "layer-wise ++": {"granularity": "layer", "plus_plus": True},
}


@dataclass
class Zoo:
    """The opened models and where learned coefficients are kept."""

    models: Models
    pool: tuple[Task, ...]
    folder: Path

    @cached_property
    def encoder(self) -> nn.Module:
        """One module that every model is loaded into in turn."""
        return self.models.new_encoder()

    @cached_property
    def train(self) -> dict[str, TaskInputs]:
        return self._tasks("train")

    @cached_property
    def test(self) -> dict[str, TaskInputs]:
        return self._tasks("test")

    def _tasks(self, split: str) -> dict[str, TaskInputs]:
        return evaluation_set(self.models.family, self.pool, split)

    def adapted(self, name: str, tasks: Mapping[str, TaskInputs], **options) -> dict[str, Tensor]:
        """The merged weights, learned now or taken from the folder."""
        models, file = self.models, self.folder / f"{name}.safetensors"
        if file.exists():
            tensors = [n for n, _ in self.encoder.named_parameters() if n in models.base]
            wanted = layout(options["granularity"], tuple(models.experts), tensors)
            options |= {"max_steps": 0, "init_values": load_coefficients(file, wanted)}
        batches = {t: ShuffledBatches(s.inputs, 16, seed=0, name=t) for t, s in tasks.items()}
        heads = {t: s.logits for t, s in tasks.items()}
        options = {"schedule": "fast", "max_steps": STEPS} | options
        result = adapt(self.encoder, models.base, models.experts, batches, heads, **options)
        if not file.exists():
            save_coefficients(result.coefficients, file)
        return result.merged

    def accuracy(self, state: Mapping[str, Tensor], tasks: Mapping[str, TaskInputs]) -> float:
        """The mean over tasks in %; the encoder goes back to the pretrained weights."""
        row = evaluate_row("", self.encoder.load(state), tasks)
        self.encoder.load(self.models.base)
        return 100 * row.mean

    def static(self, method: str, **knobs) -> dict[str, Tensor]:
        return merge(self.models.base, self.models.experts, method, **knobs)


def chosen_rates(zoo: Zoo, objectives: list[str]) -> dict[str, float]:
    """Of each objective, the learning rate with the best accuracy on the training split."""
    seen = {t: replace(s, inputs=s.inputs[SCORED:], labels=s.labels[SCORED:]) for t, s in zoo.train.items()}
    scored = {t: s.first(SCORED) for t, s in zoo.train.items()}
    best = {}
    for objective in objectives:
        found = {}
        for lr in RATES:
            options = {"granularity": "layer", "objective": objective, "lr": lr}
            found[lr] = zoo.accuracy(zoo.adapted(f"train-{objective}-{lr}", seen, **options), scored)
        best[objective] = max(found, key=lambda lr: found[lr])
        shown = ", ".join(f"lr {lr:g}: {value:.1f}" for lr, value in found.items())
        print(f"training split, {objective:21s} {shown}; chosen {best[objective]:g}", flush=True)
    return best


def check_starts(zoo: Zoo) -> None:
    """Before the first step a plain adaptation is Task Arithmetic and ++ is TIES, bit for bit."""
    models = zoo.models
    for plus_plus, method in METHODS.items():
        start = adapt(zoo.encoder, models.base, models.experts, {}, plus_plus=plus_plus, max_steps=0).merged
        static = zoo.static(method, scaling_factor=0.3)
        assert all(tensor.equal(static[name]) for name, tensor in start.items()), method
    print("at λ = 0.3 and no step, AdaMerging equals Task Arithmetic and AdaMerging++ equals TIES, bit for bit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.mkdtemp()))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), choices=list(OBJECTIVES))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run = Settings.from_config(compose(["method=task_arithmetic", "modelpool=glyphs8", "taskpool=glyphs8"]))
    zoo = Zoo(open_models(run.pool), run.tasks, options.folder)
    check_starts(zoo)
    recommended = run.taskpool.recommended if run.taskpool else {}
    starts = {plus: recommended[m]["scaling_factor"] for plus, m in METHODS.items()}
    rates = chosen_rates(zoo, options.objectives)
    static = {"pretrained": dict(zoo.models.base), "weight average": zoo.static("simple_average")}
    for plus_plus, method in METHODS.items():
        static |= {f"{method} {x:g}": zoo.static(method, scaling_factor=x) for x in (starts[plus_plus], 0.3)}
    for name, state in static.items():
        print(f"{name:24s} {zoo.accuracy(state, zoo.test):5.1f}", flush=True)
    for objective in options.objectives:
        for kind in options.kinds:
            row = [adapted_accuracy(zoo, kind, objective, x, rates[objective]) for x in starts_of(kind, starts)]
            print(f"{objective:21s} {kind:14s}" + "".join(f"  from {x:<4g} {a:5.1f}" for x, a in row), flush=True)


def starts_of(kind: str, recommended: Mapping[bool, float]) -> tuple[float, float]:
    return recommended[bool(KINDS[kind].get("plus_plus"))], 0.3


def adapted_accuracy(zoo: Zoo, kind: str, objective: str, start: float, lr: float) -> tuple[float, float]:
    """The starting value, and the mean test accuracy after adaptation to the unlabelled test inputs."""
    name = f"test-{kind}-{objective}-{start:g}".replace(" ", "")
    how = {**KINDS[kind], "objective": objective, "init_values": start, "lr": lr}
    return start, zoo.accuracy(zoo.adapted(name, zoo.test, **how), zoo.test)


if __name__ == "__main__":
    main()
