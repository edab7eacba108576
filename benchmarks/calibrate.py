"""Calibrate a merged CLIP vision tower: time and memory beside the plain forward passes of the same tower.

    python benchmarks/calibrate.py [--tasks 2] [--inputs 256] [--layers 2] [--width 768] [--image 224] [--threads 2]

`--layers 12 --tasks 8` is ViT-B/32 as in the papers; the default has two of its blocks. Towers of random weights are
made on the spot from their configuration (transformers), as are experts and inputs. Calibration needs three passes of
every input: the student's before and after a block is solved, and the expert's; the plain passes are as many. Each is a
process of its own: processor seconds, and the peak of anonymous memory above that of models and inputs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time

import torch
import watching
from torch import nn
from towers import embeds, tower

from suture.repairs import repair

BATCH = 64


def made(seed: int) -> nn.Module:
    """A tower of the sizes on the command line."""
    return tower(seed, OPTIONS.width, OPTIONS.layers, OPTIONS.image)


def plain(module, experts, inputs) -> None:
    """Three forward passes of every input."""
    with torch.no_grad():
        for task, x in inputs.items():
            for each in (module, module, experts(task)):
                for batch in x.split(BATCH):
                    embeds(each, batch)


def calibrate(module, experts, inputs) -> None:
    """What `repair=calibrate` does, with the states between blocks in mapped files."""
    with tempfile.TemporaryDirectory() as cache:
        options = {"forward": embeds, "encode_batch": BATCH, "cache": cache, "base": made(99).state_dict()}
        repair(module, experts, inputs, "calibrate", **options)


def measure(name: str) -> dict:
    torch.set_num_threads(OPTIONS.threads)
    module, loaded = made(0), made(1)
    states = [{key: tensor.clone() for key, tensor in loaded.state_dict().items()}]

    def experts(task: str) -> nn.Module:
        """One module for all tasks, as in a pipeline."""
        loaded.load_state_dict(states[0])
        with torch.no_grad():
            next(loaded.parameters()).mul_(1 + 0.01 * int(task))
        return loaded

    side = OPTIONS.image
    inputs = {str(t): torch.randn(OPTIONS.inputs, 3, side, side) for t in range(OPTIONS.tasks)}
    with watching.watched() as peak:
        start = time.process_time()
        {"plain": plain, "calibrate": calibrate}[name](module, experts, inputs)
        seconds = time.process_time() - start
    return {"seconds": seconds, "memory": peak[0]}


def main() -> None:
    if OPTIONS.one:
        print(json.dumps(measure(OPTIONS.one)))
        return
    found = {}
    for name in ("plain", "calibrate"):
        command = [sys.executable, __file__, *sys.argv[1:], "--one", name]
        found[name] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
        print(f"{name:10s} {found[name]['seconds']:8.1f} s {found[name]['memory'] / 1e9:6.2f} GB")
    print(f"calibration takes {found['calibrate']['seconds'] / found['plain']['seconds']:.2f} × the plain passes")


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
for name, default in (("tasks", 2), ("inputs", 256), ("layers", 2), ("width", 768), ("image", 224), ("threads", 2)):
    parser.add_argument(f"--{name}", type=int, default=default)
parser.add_argument("--one", help=argparse.SUPPRESS)
OPTIONS = parser.parse_args()

if __name__ == "__main__":
    main()
