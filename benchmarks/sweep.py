"""A sweep of the scale: one preparation and ten values beside one plain merge, for methods on whole matrices.

    python benchmarks/sweep.py [--layers 2] [--tasks 8] [--width 768] [--values 10] [--threads 2]

The models are CLIP vision towers of random weights, made on the spot from their configuration (transformers);
`--layers 12` is ViT-B/32. The sweep computes the update once and applies it at every value, which writes a whole model
each time. Both are timed in one process, in processor seconds: the merge, the sweep, and the merge once more, of which
the faster one counts. The last value of the sweep is checked against the merge, bit by bit.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from towers import tower

from suture import merge
from suture.merging.prepared import apply, prepare

METHODS = ("tsv_m", "aswudi")


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What `work` gives, and the processor's seconds."""
    began = time.process_time()
    return work(), time.process_time() - began


def sweep(base: Any, models: Any, method: str, values: list[float], threads: int) -> Any:
    update = prepare(base, models, method, threads=threads)
    out = {name: torch.empty_like(tensor) for name, tensor in base.items()}
    for value in values:
        merged = apply(base, update, value, out=out)
    return merged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("layers", 2), ("tasks", 8), ("width", 768), ("values", 10), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base, *models = (tower(i, options.width, options.layers).state_dict() for i in range(options.tasks + 1))
    values = [0.5 + 1.0 * i / options.values for i in range(options.values)]
    for method in METHODS:
        plain = lambda method=method: merge(base, models, method, threads=options.threads, alpha=values[-1])
        merged, first = timed(plain)
        swept, seconds = timed(lambda method=method: sweep(base, models, method, values, options.threads))
        assert all(torch.equal(merged[name], swept[name]) for name in merged)
        one = min(first, timed(plain)[1])
        print(f"{method:8s} one merge {one:7.1f} s   {len(values)} values {seconds:7.1f} s   {seconds / one:.2f} ×")


if __name__ == "__main__":
    main()
