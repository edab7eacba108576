"""AdaMerging on a ViT-B/32-sized tower and eight tasks: suture against the textbook loop. Seconds a step, and memory.

    python benchmarks/adamerging.py [--steps 2] [--repeats 3] [--scale 1.0] [--tasks 8] [--measure memory] [--rows …]
                                    [--device cuda]

The weights are random: the vision tower of CLIP ViT-B/32 with its projection (88 M parameters, float32), task vectors
of scale 1e-3, heads of 100 classes, 16 images a task and step, layer-wise coefficients, entropy. "Textbook" keeps the
merged weights in the graph, calls the module with them task by task, sums the losses and backpropagates once. Every
measurement is a process of its own, and they take turns. The first step of each warms up; the median of the others
counts. Memory is anonymous memory beyond the imports, the caller's module and the images, in sizes of one model: the
peak, and what is held between two steps. Most of the peak is what the network keeps for its backward pass, so the
passes alone are measured too. On a CPU suture goes task by task with a tower of this size, on a GPU all tasks in one
pass; "one pass" asks for the latter. The memory runs give every large tensor pages of its own, so that no freed memory
counts.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from launches import counted, line, of_a_step
from torch import Tensor, nn
from torch.nn.functional import normalize
from watching import anonymous, watched

from suture.adaptation import adapt, entropy
from suture.adaptation.merged_model import MergedModel
from suture.adaptation.network import Network
from suture.adaptation.options import AdaMergingOptions
from suture.adaptation.vectors import task_vector_rows
from suture.core.batches import ShuffledBatches
from suture.merging.task_vectors import open_task_vectors

BATCH, CLASSES = 16, 100
DEVICE = os.environ.get("SUTURE_BENCHMARK_DEVICE", "cpu")


def tower(scale: float) -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    width = int(768 * scale) // 12 * 12
    config = CLIPVisionConfig(hidden_size=width, intermediate_size=4 * width, patch_size=32, projection_dim=512)
    return CLIPVisionModelWithProjection(config).eval()


def problem(scale: float, tasks: int) -> SimpleNamespace:
    """Module, base, fine-tuned weights written nowhere but memory, images, heads; 25 MB of images in all."""
    module, generator = tower(scale).to(DEVICE), torch.Generator().manual_seed(1)
    noise = lambda *shape: torch.randn(*shape, generator=generator)
    base = {name: tensor.detach().cpu() for name, tensor in module.state_dict().items() if tensor.is_floating_point()}
    names = [f"task{t}" for t in range(tasks)]
    heads = {name: normalize(noise(CLASSES, 512), dim=-1).to(DEVICE) for name in names}
    return SimpleNamespace(
        module=module,
        base=base,
        models={name: lambda t=t: tuned(base, t) for t, name in enumerate(names)},
        images={name: noise(2 * BATCH, 3, 224, 224) for name in names},
        heads={
            name: (lambda features, head=head: 100 * normalize(features, dim=-1) @ head.T)
            for name, head in heads.items()
        },
    )


def tuned(base: dict[str, Tensor], task: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + task)
    return {name: w + 1e-3 * torch.randn(w.shape, generator=generator) for name, w in base.items()}


def batches(found: SimpleNamespace) -> dict[str, ShuffledBatches]:
    return {name: ShuffledBatches(images, BATCH, seed=0, name=name) for name, images in found.images.items()}


def forward(module: nn.Module, images: Tensor) -> Tensor:
    return module(pixel_values=images).image_embeds


def textbook(found: SimpleNamespace, folder: Path, steps: int) -> dict[str, Any]:
    """The merged weights are functions of the coefficients, and the graph goes through them."""
    base = {name: w.to(DEVICE) for name, w in found.base.items()}
    streams = {name: iter(b) for name, b in batches(found).items()}
    vectors = [{n: w.to(DEVICE) - base[n] for n, w in load(folder, name).items()} for name in found.images]
    values = torch.full((len(vectors), len(base)), 0.3, dtype=torch.float64, requires_grad=True)
    descent, times = torch.optim.Adam([values], lr=1e-3), [time.perf_counter()]
    for _ in range(steps):
        merged = {
            name: w + sum(values[t, i].float() * vector[name] for t, vector in enumerate(vectors))
            for i, (name, w) in enumerate(base.items())
        }
        losses = []
        for name, head in found.heads.items():
            output = torch.func.functional_call(
                found.module, merged, (), {"pixel_values": next(streams[name]).to(DEVICE)}
            )
            losses.append(entropy(head(output.image_embeds)))
        descent.zero_grad()
        torch.stack(losses).sum().backward()
        descent.step()
        settle()
        times.append(time.perf_counter())
    return {"times": times, "values": values.detach()}


def suture(found: SimpleNamespace, folder: Path, steps: int, autocast: bool = False, **options: Any) -> dict[str, Any]:
    """`suture.adapt`, with a clock around the network's forward and backward passes."""
    times, inside, held = [time.perf_counter()], [0.0], [0]

    def seen(*_: Any) -> None:
        held[0] = anonymous()
        times.append(time.perf_counter())
        network.append(inside[0])

    network: list[float] = []
    models = {name: folder / f"{name}.safetensors" for name in found.images}
    with clocked(inside), torch.autocast(DEVICE, torch.bfloat16, enabled=autocast, cache_enabled=False):
        result = adapt(
            *(found.module, found.base, models, batches(found), found.heads),
            **{"forward": forward, "max_steps": steps, "on_step": seen} | options,
        )
    order = [result.coefficients.layers.index(name) for name in found.base]
    return {"times": times, "network": network, "values": result.history[-1][:, order], "held": held[0]}


@contextmanager
def clocked(total: list[float]) -> Iterator[None]:
    """Add up the time of the network's own passes: all of `Network.backward` but the inner products in it."""
    backward, take = Network.backward, MergedModel._take

    def timed(function: Callable, sign: float) -> Callable:
        def run(*arguments):
            start = time.perf_counter()
            result = function(*arguments)
            total[0] += sign * (time.perf_counter() - start)
            return result

        return run

    Network.backward, MergedModel._take = timed(backward, 1.0), timed(take, -1.0)
    try:
        yield
    finally:
        Network.backward, MergedModel._take = backward, take


def load(folder: Path, name: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / f"{name}.safetensors")


def settle() -> None:
    """Wait until the device has done what it was given."""
    if DEVICE != "cpu":
        torch.cuda.synchronize()


def device_name() -> str:
    """The name of what is measured."""
    return "the CPU" if DEVICE == "cpu" else torch.cuda.get_device_name()


def free_gradients(module: nn.Module) -> None:
    """Let the backward pass make every weight's gradient and drop it as soon as it is there."""

    def free(parameter: Tensor) -> None:
        parameter.grad = None

    for parameter in module.parameters():
        parameter.requires_grad_(True).register_post_accumulate_grad_hook(free)


def network_alone(found: SimpleNamespace, folder: Path, steps: int) -> dict[str, Any]:
    """Forward and backward through the plain module, task after task, each gradient freed when it is there."""
    free_gradients(found.module)
    streams, times = {name: iter(b) for name, b in batches(found).items()}, [time.perf_counter()]
    for _ in range(steps):
        for stream, head in zip(streams.values(), found.heads.values(), strict=True):
            entropy(head(forward(found.module, next(stream).to(DEVICE)))).backward()
        settle()
        times.append(time.perf_counter())
    return {"times": times, "values": torch.zeros(0)}


AUTOCAST = "suture, bf16 autocast"
WORK: dict[str, Callable[..., dict[str, Any]]] = {
    "network alone": network_alone,
    "textbook": textbook,
    "suture": suture,
    "suture, bf16 vectors": lambda *a: suture(*a, vectors_dtype=torch.bfloat16),
    "suture, streamed": lambda *a: suture(*a, stream_vectors=True),
    "suture, one pass": lambda *a: suture(*a, concatenate=True),
    AUTOCAST: lambda *a: suture(*a, autocast=True),
}
if DEVICE != "cpu":
    WORK |= {
        "suture, as a graph": lambda *a: suture(*a, capture=True),
        "suture, bf16 autocast, as a graph": lambda *a: suture(*a, autocast=True, capture=True),
    }
OWN_PAGES = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}


def measure(work: Callable[..., dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """What one process finds: seconds a step after the first, share outside of the network, memory, coefficients."""
    found = problem(options.scale, options.tasks)
    size = sum(tensor.nbytes for tensor in found.base.values())
    before = anonymous()
    with watched() as peak:
        result = work(found, options.folder, options.steps)
    apart = lambda marks: [b - a for a, b in itertools.pairwise(marks)]
    seconds, inside = apart(result["times"])[1:], apart(result.get("network", []))
    return {
        "seconds": seconds,
        "outside": [1 - network / whole for network, whole in zip(inside, seconds, strict=False)],
        "peak": peak[0] / size,
        "held": (result["held"] - before) / size if "held" in result else None,
        "values": result["values"].tolist(),
    }


def bf16_units() -> bool:
    """Whether this processor multiplies bfloat16 matrices in hardware."""
    flags = Path("/proc/cpuinfo").read_text()
    return "amx_bf16" in flags or "avx512_bf16" in flags


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--scale", type=float, default=1.0, help="width relative to ViT-B/32")
    parser.add_argument(
        "--rows", nargs="*", default=list(WORK), choices=list(WORK), help="out of which the table is made"
    )
    parser.add_argument("--measure", nargs="*", default=["memory", "time"], choices=["memory", "time", "operators"])
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--device", default=DEVICE, choices=["cpu", "cuda"])
    options = parser.parse_args()
    if options.device != DEVICE:  # which every process reads when it starts
        os.environ["SUTURE_BENCHMARK_DEVICE"] = options.device
        os.execv(sys.executable, [sys.executable, *sys.argv])
    if options.one:
        print(json.dumps(measure(WORK[options.one], options)))
        return
    import tempfile

    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        found = problem(options.scale, options.tasks)
        for name, make in found.models.items():
            save_file(make(), Path(folder) / f"{name}.safetensors")
        size = sum(tensor.nbytes for tensor in found.base.values())
        del found
        print(f"model size {size / 1e6:.0f} MB; {options.tasks} tasks; on {device_name()}", flush=True)
        compare(Path(folder), options)


def compare(folder: Path, options: argparse.Namespace) -> None:
    if AUTOCAST in options.rows and DEVICE == "cpu" and not bf16_units():
        print(f"{AUTOCAST}: skipped, because this processor has no bfloat16 matrix units", flush=True)
        options.rows.remove(AUTOCAST)
    if "memory" in options.measure:
        compare_memory(folder, options)
    if "time" in options.measure:
        compare_time(folder, options)
    if "operators" in options.measure:
        compare_operators(folder, options)


def compare_operators(folder: Path, options: argparse.Namespace) -> None:
    """Operators of PyTorch in one step, tensor by tensor and in buffers; each is at least one launch on a device.

    What only makes a view launches nothing and does not count.
    """
    found = problem(options.scale, options.tasks)
    models = {name: folder / f"{name}.safetensors" for name in found.images}
    vectors = open_task_vectors(found.base, models)
    images = torch.cat([images[:1] for images in found.images.values()]).to(DEVICE)
    for name, flat in (("tensor by tensor", False), ("in buffers", True)):
        rows = task_vector_rows(vectors, AdaMergingOptions())
        outside, backward = operators(MergedModel(found.module, vectors, rows, flat=flat), images)
        print(f"{name:20s} {outside:5d} operators for merge and gradient, {backward:5d} in the backward pass")
    for name, work in whole_steps(folder, options).items():
        print(line(name, of_a_step(work)), flush=True)


def whole_steps(folder: Path, options: argparse.Namespace) -> dict[str, Callable[[int], Any]]:
    """Loops of so many steps: the textbook's, and suture's as it runs on a CPU and on a GPU."""
    loop = lambda work, **more: lambda steps: work(problem(options.scale, options.tasks), folder, steps, **more)

    def in_buffers(steps: int) -> None:
        with patch("suture.adaptation.merged_model.in_buffers", lambda device: True):
            loop(suture, concatenate=True)(steps)

    return {
        "textbook": loop(textbook),
        "suture, task by task and tensor by tensor": loop(suture, concatenate=False),
        "suture, in one pass and in buffers": in_buffers,
    }


def operators(model: MergedModel, images: Tensor) -> tuple[int, int]:
    """Those of the merge and the gradient of the coefficients, and those of the backward pass with its hooks."""
    coefficients = torch.rand(len(model.vectors.models), len(model.names), dtype=torch.float64)
    with model.collecting():
        outside = counted(lambda: model.write(coefficients))
        loss = forward(model.module, images).square().sum()
        backward = counted(lambda: model.backward(loss))
        return outside + counted(model.gradient), backward


def compare_memory(folder: Path, options: argparse.Namespace) -> None:
    alone = 0.0
    for name in options.rows:
        found = one(name, folder, options, steps=1, environment=OWN_PAGES)
        alone = alone or found["peak"]
        held = "" if found["held"] is None else f"   {found['held']:5.2f} held between steps"
        print(
            f"{name:22s} peak {found['peak']:5.2f}, {found['peak'] - alone:5.2f} beyond the network's{held}", flush=True
        )


def compare_time(folder: Path, options: argparse.Namespace) -> None:
    runs = {name: [] for name in options.rows}
    for _ in range(options.repeats):
        for name in runs:  # interleaved, so that a noisy minute hits all of them
            runs[name].append(one(name, folder, options, steps=options.steps))
    pooled = lambda name, key: [value for run in runs[name] for value in run[key]]
    for name in runs:
        seconds, outside = pooled(name, "seconds"), pooled(name, "outside")
        share = f"   {statistics.median(outside):.1%} outside of the network" if outside else ""
        spread = f"({min(seconds):.1f} – {max(seconds):.1f})"
        print(f"{name:22s} {statistics.median(seconds):6.1f} s a step {spread}{share}", flush=True)
    if "textbook" in runs:
        for name in (name for name in runs if name.startswith("suture")):
            ratios = [a / b for a, b in zip(pooled("textbook", "seconds"), pooled(name, "seconds"), strict=True)]
            values = [torch.tensor(runs[row][0]["values"]) for row in ("textbook", name)]
            apart = f"{(values[0] - values[1]).abs().max():.1e}"
            print(f"textbook / {name}: {statistics.median(ratios):.2f}; coefficients at most {apart} apart at the end")


def one(name: str, folder: Path, options: argparse.Namespace, *, steps: int, environment: dict[str, str] | None = None):
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--one", name, "--folder", str(folder), "--steps", str(steps)]
    command += ["--tasks", str(options.tasks), "--scale", str(options.scale)]
    environment = {**os.environ, **(environment or {})}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
