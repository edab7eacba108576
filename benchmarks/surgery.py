"""Repair a merged ViT-B/32 vision tower: suture against the textbook loops of Representation Surgery and SurgeryV2.

    python benchmarks/surgery.py [--tasks 4] [--inputs 32] [--steps 1000] [--measured 2] [--repeats 1] [--full]
                                 [--device cuda] [--precision bf16-mixed] [--operators]

CLIP's vision tower with its projection, made on the spot from its configuration with random weights (transformers), as
are the experts and the inputs. "Textbook" is what the authors' code does: the expert at every step, one task after
another; for V2 also gradients through everything, with all weights requiring one. Of all but suture's V1, which is run
whole, `measured` steps are run and the rate of all but the first is taken. What `steps` steps cost is extrapolated from
that, and what other numbers of inputs cost from the seconds that an encoding took; `--full` runs every step of
everything. Every measurement is a process of its own on one thread: processor seconds, which a busy machine disturbs
less than wall time, and the peak of anonymous memory above that of the models and inputs. On a GPU the seconds are
those of the clock, the memory is torch's, and suture's steps are also recorded as CUDA graphs. `--operators` counts
PyTorch's operators in a step instead, on a narrow tower of the same depth, as suture takes it on a CPU and on a GPU.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from unittest.mock import patch

import torch
import watching
from launches import line, of_a_step
from torch import nn
from towers import embeds, tower

from suture.core.batches import ShuffledBatches
from suture.core.fabric import OneDevice
from suture.repairs import Block, SurgeryModules, repair
from suture.repairs.network import FINAL

LR, RANK, BATCH = 1e-3, 16, 16
DEVICE = torch.device(os.environ.get("SUTURE_BENCHMARK_DEVICE", "cpu"))
FIRST = 1 if DEVICE.type == "cpu" else 20  # steps that warm up; on a GPU suture tells steps in blocks of so many


class Problem:
    """The merged tower, the experts, and the inputs: what all contestants are given."""

    def __init__(self, options):
        self.options = options
        sizes = (64, 12) if options.operators else (768, 12) if options.scale == 1 else (64, 3)
        self.module = tower(0, *sizes).to(DEVICE)
        self.experts = {f"task{t}": tower(t + 1, *sizes).to(DEVICE) for t in range(options.tasks)}
        draw = lambda t: torch.randn(options.inputs, 3, 224, 224, generator=torch.Generator().manual_seed(t))
        self.inputs = {task: draw(t) for t, task in enumerate(self.experts)}

    def batches(self) -> dict[str, ShuffledBatches]:
        return {task: ShuffledBatches(x, BATCH, name=task) for task, x in self.inputs.items()}

    def blocks(self) -> list[Block]:
        layers = self.module.vision_model.encoder.layers
        return [
            Block(f"vision_model.encoder.layers.{i}", layer.layer_norm1.bias.numel()) for i, layer in enumerate(layers)
        ]

    def pairs(self, layers: list[tuple[str, int]]) -> dict[str, list[list[nn.Parameter]]]:
        """A D and a U for each task and layer, from the start that suture takes."""
        stacks = [SurgeryModules(list(self.experts), dim, RANK, layer=layer) for layer, dim in layers]
        return {
            task: [[nn.Parameter(p[t].detach().clone().to(DEVICE)) for p in (s.down, s.up)] for s in stacks]
            for t, task in enumerate(self.experts)
        }


def fixed(z: torch.Tensor, pair: list[nn.Parameter]) -> torch.Tensor:
    return z - (z @ pair[0].T).relu() @ pair[1].T


def textbook_v1(problem: Problem, steps: int, clock) -> dict:
    """Both encoders on every batch, one autograd step for each task and step."""
    pairs, streams, losses = problem.pairs([(FINAL, 512)]), problem.batches(), []
    adams = {task: torch.optim.Adam(pair[0], lr=LR) for task, pair in pairs.items()}
    for step in range(steps):
        clock(step)
        for task, (pair,) in pairs.items():
            with torch.no_grad():
                x = streams[task][step].to(DEVICE)
                z, wanted = (passed(problem, m, x) for m in (problem.module, problem.experts[task]))
            loss = (fixed(z, pair) - wanted).abs().mean()
            adams[task].zero_grad()
            loss.backward()
            adams[task].step()
            losses.append(loss.item())
    return {"losses": losses, "passes": 2 * steps * len(pairs) * BATCH}


def textbook_v2(problem: Problem, steps: int, clock) -> dict:
    """The expert at every step, one task at a time, and gradients of everything."""
    blocks = problem.blocks()
    pairs = problem.pairs([*((b.path, b.dim) for b in blocks), (FINAL, 512)])
    streams, losses = problem.batches(), []
    adams = {task: torch.optim.Adam([p for pair in all_of for p in pair], lr=LR) for task, all_of in pairs.items()}
    for step in range(steps):
        clock(step)
        for task, places in pairs.items():
            seen: list[torch.Tensor] = []
            x = streams[task][step].to(DEVICE)
            with torch.no_grad():
                wanted = watched(problem, problem.experts[task], x, blocks, seen, None)
            goals, seen = seen, []
            z = fixed(watched(problem, problem.module, x, blocks, seen, places), places[-1])
            loss = (z - wanted).abs().mean()
            for mine, goal in zip(seen, goals, strict=True):
                loss = loss + (mine.mean(1) - goal.mean(1)).abs().mean()
            adams[task].zero_grad()
            loss.backward()
            adams[task].step()
            problem.module.zero_grad()
            losses.append(loss.item())
    return {"losses": losses, "passes": 2 * steps * len(pairs) * BATCH}


def passed(problem: Problem, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The feature, in the precision that was asked for."""
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=problem.options.precision == "bf16-mixed"):
        return embeds(module, x).float()


def watched(problem, module, x, blocks, seen, places) -> torch.Tensor:
    """The feature; the (corrected) tokens after each block go to `seen`."""

    def hook(m, arguments, output):
        seen.append(output if places is None else fixed(output, places[len(seen)]))
        return seen[-1]

    handles = [module.get_submodule(block.path).register_forward_hook(hook) for block in blocks]
    try:
        return passed(problem, module, x)
    finally:
        for handle in handles:
            handle.remove()


def suture_final(problem: Problem, steps: int, clock, **options) -> dict:
    """What `suture` runs. The clock ticks when the encodings and the first step are done, and so on."""
    return suture(problem, "final", steps, clock, **options)


def suture_deep(problem: Problem, steps: int, clock, **options) -> dict:
    """What `suture` runs."""
    return suture(problem, "deep", steps, clock, **options)


def suture(problem: Problem, kind: str, steps: int, clock, **options) -> dict:
    device = OneDevice({"accelerator": DEVICE.type, "precision": problem.options.precision})
    forward = lambda module, x: device.call(lambda pixels: embeds(module, pixels), x)
    run = {"forward": forward, "rank": RANK, "on_step": lambda step, *_: clock(step + 1), "look_every": FIRST}
    clock(0)
    result = repair(problem.module, problem.experts, problem.inputs, kind, steps=steps, **run, **options)
    return {"losses": result.losses.flatten().tolist(), "passes": result.passes.merged + result.passes.experts}


WORK = {
    "suture final": suture_final,
    "textbook final": textbook_v1,
    "suture deep": suture_deep,
    "suture deep, all at once": lambda *a: suture_deep(*a, concatenate=True),
    "textbook deep": textbook_v2,
}
if DEVICE.type == "cuda":
    WORK |= {
        "suture final, as a graph": lambda *a: suture_final(*a, capture=True),
        "suture deep, as a graph": lambda *a: suture_deep(*a, capture=True),
    }


def measure(work, options, steps: int) -> dict:
    """Processor seconds at each tick of the clock and the end, losses, passes, peak of added anonymous memory."""
    torch.set_num_threads(1)
    problem = Problem(options)
    ticks: list[float] = []
    with watching.watched() as peak:
        start = now()
        found = work(problem, steps, lambda step: ticks.append(now() - start))
        seconds = now() - start
    memory = peak[0] if DEVICE.type == "cpu" else torch.cuda.max_memory_allocated()
    return {**found, "ticks": [*ticks, seconds], "memory": memory}


def now() -> float:
    """Processor seconds; on a device those of the clock, once it has done what it was given."""
    if DEVICE.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def count_operators(options) -> None:
    """The operators of a step of every loop; "as on a GPU" with batches drawn there and one launch for Adam."""
    problem, still = Problem(options), lambda step: None

    def as_on_a_gpu(work, steps: int) -> None:
        with ExitStack() as stack:
            stack.enter_context(patch("suture.repairs.resident.free_memory", lambda device: 1 << 40))
            stack.enter_context(patch("suture.repairs.fitting.is_fused", lambda device: True))
            work(steps)

    final = lambda steps: suture_final(problem, steps, still)
    deep = lambda steps: suture_deep(problem, steps, still, concatenate=True)
    loops = {
        "textbook final": lambda steps: textbook_v1(problem, steps, still),
        "suture final": final,
        "suture final, as on a GPU": lambda steps: as_on_a_gpu(final, steps),
        "textbook deep": lambda steps: textbook_v2(problem, steps, still),
        "suture deep, all at once": deep,
        "suture deep, all at once, as on a GPU": lambda steps: as_on_a_gpu(deep, steps),
    }
    for name, loop in loops.items():
        print(line(name, of_a_step(loop)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("tasks", 4), ("inputs", 32), ("steps", 1000), ("measured", 2), ("repeats", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--scale", type=float, default=1.0, help="anything but 1 is a small tower, to try the script")
    parser.add_argument("--full", action="store_true", help="run all steps of everything")
    parser.add_argument("--operators", action="store_true", help="count the operators of a step")
    parser.add_argument("--precision", default="32-true", choices=["32-true", "bf16-mixed"])
    parser.add_argument("--device", default=DEVICE.type, choices=["cpu", "cuda"])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device != DEVICE.type:  # which every process reads when it starts
        os.environ["SUTURE_BENCHMARK_DEVICE"] = options.device
        os.execv(sys.executable, [sys.executable, *sys.argv])
    if options.operators:
        count_operators(options)
        return
    if options.one:
        name, steps = options.one.split(":")
        print(json.dumps(measure(WORK[name], options, int(steps))))
        return
    compare(options)


def run(name: str, steps: int) -> dict:
    command = [sys.executable, __file__, *sys.argv[1:], "--one", f"{name}:{steps}"]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def compare(options) -> None:
    few = options.steps if options.full else options.measured
    counts = {name: options.steps if name.startswith("suture final") else few for name in WORK}
    runs = {name: [] for name in WORK}
    for _ in range(options.repeats):
        for name, steps in counts.items():  # interleaved, so that a noisy minute hits all of them
            runs[name].append(run(name, steps))
    print("on the CPU" if DEVICE.type == "cpu" else f"on {torch.cuda.get_device_name()}", options.precision)
    print(
        f"{options.tasks} tasks, {options.inputs} inputs each, batch {BATCH}, rank {RANK}; medians of {options.repeats}"
    )
    typical = {name: medians(found, counts[name]) for name, found in runs.items()}
    for name, (before, step, memory) in typical.items():
        print(f"{name:26s} {before:6.1f} s once, {1000 * step:8.1f} ms a step ({counts[name]} run), {memory:5.2f} GB")
    for kind in ("final", "deep"):
        losses = [
            torch.tensor(runs[f"{who} {kind}"][0]["losses"], dtype=torch.float64) for who in ("suture", "textbook")
        ]
        both = min(map(len, losses))
        apart = (losses[0][:both] - losses[1][:both]).abs().max().item()
        print(f"{kind}: the losses of the first {both // options.tasks} steps differ by {apart:.1e} at most")
    print(f"{options.steps} steps, {'measured' if options.full else 'extrapolated'}, by the number of inputs a task:")
    for inputs in (options.inputs,) if options.full else (160, 1600, 16000):
        print(f"{inputs:6d}: {', '.join(ratios(typical, counts, inputs, options))}")


def medians(found: list[dict], steps: int) -> tuple[float, float, float]:
    """Seconds before the first step (for textbook loops none), seconds a step, and GB."""
    once = len(found[0]["ticks"]) > steps + 1  # suture ticks at the start, after every step, and at the end
    rates = [(r["ticks"][steps] - r["ticks"][FIRST]) / (steps - FIRST) for r in found]
    before = [max(r["ticks"][FIRST] - FIRST * rate, 0.0) if once else 0.0 for r, rate in zip(found, rates, strict=True)]
    return (*map(statistics.median, (before, rates)), statistics.median(r["memory"] for r in found) / 1e9)


def ratios(typical: dict, counts: dict, inputs: int, options) -> list[str]:
    """Seconds of all steps and how many times less that is than the textbook's, for so many inputs a task."""
    seconds, lines = {}, []
    for name, (before, step, _) in typical.items():
        encoded = min(options.inputs, counts[name] * BATCH)
        seconds[name] = before * min(inputs, options.steps * BATCH) / encoded + step * options.steps
    for name, value in seconds.items():
        other = seconds[f"textbook {name.split()[1].strip(',')}"]
        lines.append(f"{name} {value:.0f} s" + ("" if value == other else f" ({other / value:.1f} times)"))
    return lines


if __name__ == "__main__":
    main()
