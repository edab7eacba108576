"""Distillation on the zoo: the start, the number of inputs, the weights that are trained, and what else it changes.

    python benchmarks/distil.py [--steps N] [--threads N] [--parts start inputs weights left labels]

Every row is one run on unlabelled training inputs, scored on the test split: `start` varies the model that is
distilled, `inputs` the number of inputs of each task, `weights` what is trained, `left` distils seven tasks and scores
the eighth, and `labels` trains on the labels that the experts predict instead of their features.
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from suture import merge, repair
from suture.core.batches import ShuffledBatches
from suture.core.random import generator_for
from suture.evaluation import TaskInputs, evaluate_row, evaluation_set
from suture.merging.registry import methods
from suture.pipeline.config import compose
from suture.pipeline.models import open_models
from suture.pipeline.settings import Settings
from suture.repairs.training import one_cycle

STARTS = ("task_arithmetic", "ties_merging", "aswudi")
WEIGHTS = {
    "norms": {"parameters": "norms"},
    "lora r4": {"parameters": "lora", "rank": 4},
    "lora r16": {"parameters": "lora", "rank": 16},
    "all": {},
    "all, and distances after blocks": {"layers": "blocks"},
}
LEFT = ("georgian", "arrows")
BATCH = 16


class Zoo:
    """The opened models, their tasks, and a folder of encodings."""

    def __init__(self, steps: int, folder: str):
        settings = Settings.from_config(compose(["method=simple_average", "modelpool=glyphs8", "taskpool=glyphs8"]))
        self.models, self.steps, self.folder = open_models(settings.pool), steps, folder
        self.train, self.test = (evaluation_set(self.models.family, settings.tasks, s) for s in ("train", "test"))
        self.experts = self.models.new_encoder()

    def start(self, method: str, tasks: list[str] | None = None) -> nn.Module:
        """The pretrained model, or a merge of the experts of some tasks."""
        if method == "pretrained":
            return self.models.new_encoder()
        chosen = {name: self.models.experts[name] for name in tasks or self.models.experts}
        return self.models.new_encoder().load(merge(self.models.base, chosen, method))

    def inputs(self, count: int | None, tasks: list[str] | None = None) -> dict[str, Tensor]:
        """So many training inputs of every task, chosen as a run chooses them."""
        chosen = {}
        for name in tasks or self.train:
            order = torch.randperm(len(self.train[name]), generator=generator_for(0, f"{name}/calibration"))
            chosen[name] = self.train[name].inputs_at(order[:count]) if count else self.train[name].inputs
        return chosen

    def expert(self, task: str) -> nn.Module:
        return self.experts.load(self.models.experts[task])

    def distilled(self, start: nn.Module, inputs: Mapping[str, Tensor], **knobs) -> nn.Module:
        options = {"steps": self.steps, "batch_size": BATCH, "base": self.models.base, "cache": self.folder, **knobs}
        return repair(start, self.expert, inputs, "distil", **options).model

    def accuracy(self, module: nn.Module, tasks: Mapping[str, TaskInputs] | None = None) -> float:
        return 100 * evaluate_row("", module, tasks or self.test).mean


def report(name: str, work) -> None:
    """One line: what was done, what it gives, and the processor's seconds."""
    began = time.process_time()
    values = work()
    print(f"{name:60s} {values}   {time.process_time() - began:5.0f} s", flush=True)


def compare_starts(zoo: Zoo) -> None:
    for method in ("pretrained", *(name for name in STARTS if name in methods())):

        def work(method: str = method) -> str:
            start = zoo.start(method)
            return f"{zoo.accuracy(start):.1f} → {zoo.accuracy(zoo.distilled(start, zoo.inputs(256))):.1f}"

        report(f"start: {method}, 256 inputs a task", work)


def compare_inputs(zoo: Zoo) -> None:
    start = zoo.start("task_arithmetic")
    for count in (16, 64, None):
        distilled = partial(zoo.distilled, start, zoo.inputs(count))
        report(f"inputs: {count or 'all'}", lambda d=distilled: f"{zoo.accuracy(d()):.1f}")


def compare_weights(zoo: Zoo) -> None:
    start = zoo.start("task_arithmetic")
    for name, knobs in WEIGHTS.items():
        distilled = partial(zoo.distilled, start, zoo.inputs(256), **knobs)
        report(f"weights: {name}, 256 inputs a task", lambda d=distilled: f"{zoo.accuracy(d()):.1f}")


def leave_out(zoo: Zoo) -> None:
    """Distil seven tasks and score the eighth, which the pretrained model knows by its zero-shot head."""
    for left in LEFT:
        others, test = [name for name in zoo.test if name != left], {left: zoo.test[left]}
        start = zoo.start("task_arithmetic", others)
        seven = {name: zoo.test[name] for name in others}

        def work(left=left, start=start, seven=seven, test=test) -> str:
            after = zoo.distilled(start, zoo.inputs(256, list(seven)))
            models = {"pretrained": zoo.start("pretrained"), "merged": start, "distilled": after}
            scores = {n: f"{zoo.accuracy(m, test):.1f} / {zoo.accuracy(m, seven):.1f}" for n, m in models.items()}
            return ", ".join(f"{name} {score}" for name, score in scores.items())

        report(f"left out: {left} (the task / the other seven)", work)


def train_on_labels(zoo: Zoo) -> None:
    """Cross-entropy to the labels that the experts predict: same start, inputs, batches, steps and schedule."""
    for count in (256, None):

        def work(count=count) -> str:
            student, inputs = copy.deepcopy(zoo.start("task_arithmetic")), zoo.inputs(count)
            labels = {}
            for task, rows in inputs.items():
                with torch.no_grad():
                    features = torch.cat([zoo.expert(task)(part) for part in rows.split(256)])
                labels[task] = zoo.train[task].logits(features).argmax(-1)
            weights = [p.requires_grad_() for n, p in student.named_parameters() if n in zoo.models.base]
            adam = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0)
            batches = {task: ShuffledBatches(rows, BATCH, name=task) for task, rows in inputs.items()}
            for step in range(zoo.steps):
                chosen = {task: stream.indices(step) for task, stream in batches.items()}
                features = student(torch.cat([inputs[task][i] for task, i in chosen.items()])).split(BATCH)
                pairs = zip(chosen.items(), features, strict=True)
                loss = sum(cross_entropy(zoo.train[t].logits(rows), labels[t][i]) for (t, i), rows in pairs)
                adam.zero_grad()
                loss.backward()
                adam.param_groups[0]["lr"] = 1e-3 * one_cycle(step, zoo.steps)
                adam.step()
            return f"{zoo.accuracy(student):.1f}"

        report(f"labels predicted by the experts, {count or 'all'} inputs a task", work)


PARTS = {
    "start": compare_starts,
    "inputs": compare_inputs,
    "weights": compare_weights,
    "left": leave_out,
    "labels": train_on_labels,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        zoo = Zoo(options.steps, folder)
        print(f"{options.steps} steps of {BATCH} inputs a task; accuracy in %, mean of all tasks; processor seconds")
        for part in options.parts:
            PARTS[part](zoo)


if __name__ == "__main__":
    main()
