"""A ViT-B/32 tower, forward and backward over 128 inputs in passes of 16, 32 and 128; glibc as it is or keeping blocks.

    python benchmarks/passes.py [--repeats 2] [--scale 1.0]

Every line is a process of its own; seconds for all 128 inputs, one figure a repeat. "Blocks kept" tells glibc to take
large blocks from the heap and to give none back, so that activations do not need fresh pages from the kernel each time.
"""

import argparse
import os
import subprocess
import sys
import time

import torch
from adamerging import forward, free_gradients, tower

INPUTS, PASSES = 128, (16, 32, 128)
KEPT = {"MALLOC_MMAP_THRESHOLD_": 1 << 32, "MALLOC_TRIM_THRESHOLD_": 1 << 36, "MALLOC_TOP_PAD_": 1 << 26}


def measure(inputs_a_pass: int, repeats: int, scale: float) -> list[float]:
    module, seconds = tower(scale), []
    free_gradients(module)
    images = torch.randn(INPUTS, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    for _ in range(repeats):
        start = time.perf_counter()
        for part in images.split(inputs_a_pass):
            forward(module, part).square().sum().backward()
        seconds.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--scale", type=float, default=1.0, help="width relative to ViT-B/32")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(", ".join(f"{seconds:.2f}" for seconds in measure(options.one, options.repeats, options.scale)))
        return
    for label, settings in (("glibc as it is", {}), ("blocks kept", KEPT)):
        environment = os.environ | {name: str(value) for name, value in settings.items()}
        for size in PASSES:
            command = [sys.executable, __file__, "--one", str(size), "--repeats", str(options.repeats)]
            command += ["--scale", str(options.scale)]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            print(f"{label:16s} {size:4d} inputs a pass: {done.stdout.strip()} s", flush=True)


if __name__ == "__main__":
    main()
