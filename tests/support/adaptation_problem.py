"""A small adaptation problem, made on the spot."""

import torch
from torch import nn


def network():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


def problem(dtype=torch.float32, tasks=3, build=network, seed=0, shape=(6,)):
    """A module, its weights, fine-tuned weights a task, and two batches a task."""
    torch.manual_seed(seed)
    module = build().to(dtype).eval()
    base = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    tune = lambda w: w + 0.3 * torch.randn_like(w) if w.is_floating_point() else w + 5
    models = {f"t{i}": {name: tune(tensor) for name, tensor in base.items()} for i in range(tasks)}
    batches = {task: [torch.randn(3, *shape, dtype=dtype) for _ in range(2)] for task in models}
    return module, base, models, batches
