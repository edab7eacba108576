"""A small network of its own kind, two fine-tunes of it and their data: python examples/make_module.py

It takes seconds and leaves `nets.py`, the folder `weights` (pretrained, moved, turned) and the folder `data` (train.pt
and test.pt of each task) in the working directory. Inputs are strokes (16 points in the plane) of four kinds, moved
to the side or turned by a quarter; the label is the kind.
"""

import math
from pathlib import Path

import torch

NETS = '''"""The network, and how it is made."""

from torch import nn


def make(width):
    return nn.Sequential(nn.Flatten(), nn.Linear(32, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
                         nn.Linear(width, 4))
'''
WIDTH = 64
SPLITS = {"train": 512, "test": 400}


def strokes(count: int, shift: float, turn: float) -> dict[str, torch.Tensor]:
    """Noisy strokes (count, 16, 2) moved to the side and turned by about an angle, and their kinds (count,)."""
    t = torch.linspace(-1, 1, 16)
    kinds = [(t, 0 * t), (t, t**2 - 0.5), (t, torch.sin(math.pi * t)), (torch.cos(math.pi * t), torch.sin(math.pi * t))]
    labels = torch.randint(len(kinds), (count,))
    points = torch.stack([torch.stack(kind, -1) for kind in kinds])[labels]
    angles = turn + 0.3 * torch.randn(count)
    turned = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], -1).view(count, 2, 2)
    return {"inputs": points @ turned + shift + 0.25 * torch.randn(count, 16, 2), "labels": labels}


def train(net: torch.nn.Module, data: dict[str, torch.Tensor], steps: int, lr: float) -> None:
    """Adam on all inputs."""
    adam = torch.optim.Adam(net.parameters(), lr=lr)
    for _ in range(steps):
        adam.zero_grad()
        torch.nn.functional.cross_entropy(net(data["inputs"]), data["labels"]).backward()
        adam.step()


def main() -> None:
    torch.manual_seed(0)
    Path("nets.py").write_text(NETS, "utf-8")
    names: dict = {}
    exec(NETS, names)
    net = names["make"](WIDTH)
    Path("weights").mkdir(exist_ok=True)
    train(net, strokes(512, 0.0, 0.0), steps=60, lr=3e-3)
    torch.save(net.state_dict(), "weights/pretrained.pt")
    for task, (shift, turn) in {"moved": (1.5, 0.0), "turned": (0.0, math.pi / 2)}.items():
        folder = Path("data", task)
        folder.mkdir(parents=True, exist_ok=True)
        data = {split: strokes(count, shift, turn) for split, count in SPLITS.items()}
        for split, content in data.items():
            torch.save(content, folder / f"{split}.pt")
        net.load_state_dict(torch.load("weights/pretrained.pt"))
        train(net, data["train"], steps=60, lr=2e-3)
        torch.save(net.state_dict(), f"weights/{task}.pt")
    print("nets.py; weights: pretrained, moved, turned; data: moved, turned")


if __name__ == "__main__":
    main()
