"""The fast schedule of AdaMerging against the published one: objective and accuracy, and what each cost.

    python benchmarks/adamerging_schedule.py [--problems zoo mlp] [--granularities task layer] [--folder DIR]

Both start from λ = 0.3 and minimise the entropy of the same unlabelled test inputs, 16 a task and step, the published
schedule for 1,000 steps and the fast one for 200. The objective is then taken on 250 other test inputs of each task
that neither has seen, and the accuracy on the whole test split. The eight-expert CLIP is the zoo's; the multilayer
perceptron is trained here, in seconds, on the same eight tasks. `--folder` keeps what has been learned, so that a run
that was ended goes on.
"""

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from suture.adaptation import adapt, entropy, layout, load_coefficients, save_coefficients
from suture.core.batches import ShuffledBatches
from suture.evaluation import TaskInputs, evaluate, evaluation_set
from suture.pipeline.config import compose
from suture.pipeline.models import Models, open_models
from suture.pipeline.settings import Settings

HELD_OUT = 250
HEADER = "network  λ      schedule   steps  entropy    start  accuracy  start"


@dataclass(frozen=True)
class Problem:
    """A module, its checkpoints, its test inputs, and its head for each task."""

    module: nn.Module
    base: Mapping[str, Tensor]
    models: Mapping[str, Mapping[str, Tensor]]
    test: Mapping[str, TaskInputs]
    heads: Mapping[str, nn.Module]


def zoo_tasks(split: str) -> tuple[Models, dict[str, TaskInputs]]:
    run = Settings.from_config(compose(["method=task_arithmetic", "modelpool=glyphs8", "taskpool=glyphs8"]))
    models = open_models(run.pool)
    return models, evaluation_set(models.family, run.tasks, split)


def zoo() -> Problem:
    models, test = zoo_tasks("test")
    return Problem(models.new_encoder(), models.base, models.experts, test, {t: s.logits for t, s in test.items()})


def mlp() -> Problem:
    """A trunk pretrained on all tasks, their heads, and the trunk fine-tuned on each task with its head frozen."""
    train, test = (gray(zoo_tasks(split)[1]) for split in ("train", "test"))
    torch.manual_seed(0)
    trunk = nn.Sequential(
        *(nn.Flatten(), nn.Linear(256, 256), nn.LayerNorm(256), nn.ReLU()),
        *(nn.Linear(256, 256), nn.LayerNorm(256), nn.ReLU(), nn.Linear(256, 128)),
    )
    heads = nn.ModuleDict({task: nn.Linear(128, int(inputs.labels.max()) + 1) for task, inputs in train.items()})
    fit(trunk, heads, train, [*trunk.parameters(), *heads.parameters()], steps=300)
    base = copied(trunk)
    models = {}
    for task in train:
        trunk.load_state_dict(base)
        fit(trunk, heads, {task: train[task]}, list(trunk.parameters()), steps=300)
        models[task] = copied(trunk)
    trunk.load_state_dict(base)
    return Problem(trunk.eval().requires_grad_(False), base, models, test, dict(heads.requires_grad_(False).items()))


def gray(tasks: Mapping[str, TaskInputs]) -> dict[str, TaskInputs]:
    return {t: replace(s, inputs=s.inputs[:, :1].float() / 127 - 1, head=None) for t, s in tasks.items()}


def fit(trunk: nn.Module, heads: nn.ModuleDict, tasks: Mapping[str, TaskInputs], parameters: list, steps: int) -> None:
    order = {t: ShuffledBatches(torch.arange(len(s)), 32, seed=1, name=t) for t, s in tasks.items()}
    descent = torch.optim.Adam(parameters, lr=1e-3)
    for step in range(steps):
        descent.zero_grad()
        for task, batches in order.items():
            index = batches[step]
            cross_entropy(heads[task](trunk(tasks[task].inputs[index])), tasks[task].labels[index]).backward()
        descent.step()


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def learned(problem: Problem, granularity: str, schedule: str, file: Path, **options):
    """Adapt with this schedule, or take what `file` holds from before."""
    batches = {t: ShuffledBatches(s.inputs[:-HELD_OUT], 16, seed=0, name=t) for t, s in problem.test.items()}
    how = {"granularity": granularity, "schedule": schedule, **options}
    if file.exists():
        names = [name for name, _ in problem.module.named_parameters() if name in problem.base]
        values = load_coefficients(file, layout(granularity, tuple(problem.models), names))
        how |= {"max_steps": 0, "init_values": values}
    result = adapt(problem.module, problem.base, problem.models, batches, problem.heads, **how)
    save_coefficients(result.coefficients, file)
    return result


@torch.inference_mode()
def scores(problem: Problem, merged: Mapping[str, Tensor]) -> tuple[float, float]:
    """Entropy summed over tasks, on the inputs held out; mean accuracy over the test splits, in %."""
    before = copied(problem.module)
    problem.module.load_state_dict(dict(merged), strict=False)
    total, accuracies = 0.0, []
    for task, inputs in problem.test.items():
        seen = lambda batch, task=task: problem.heads[task](problem.module(batch))
        total += entropy(seen(inputs.inputs[-HELD_OUT:])).item()
        accuracies.append(evaluate(seen, replace(inputs, head=None)).value)
    problem.module.load_state_dict(before)
    return total, 100 * sum(accuracies) / len(accuracies)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", nargs="+", default=["zoo", "mlp"], choices=["zoo", "mlp"])
    parser.add_argument("--granularities", nargs="+", default=["task", "layer"])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.mkdtemp()))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(HEADER, flush=True)
    for name in options.problems:
        problem = {"zoo": zoo, "mlp": mlp}[name]()
        start = scores(problem, adapt(problem.module, problem.base, problem.models, {}, max_steps=0).merged)
        for granularity in options.granularities:
            for schedule, steps in (("constant", 1000), ("fast", 200)):
                file = options.folder / f"{name}_{granularity}_{schedule}.safetensors"
                found = scores(problem, learned(problem, granularity, schedule, file).merged)
                columns = f"{name:8s} {granularity:6s} {schedule:10s} {steps:5d} {found[0]:8.3f} {start[0]:8.3f}"
                print(f"{columns} {found[1]:9.1f} {start[1]:6.1f}", flush=True)


if __name__ == "__main__":
    main()
