"""AdaMerging on your own module: two fine-tunes, unlabelled inputs, coefficients learned layer by layer."""

import torch
from torch import nn

import suture


def build() -> nn.Module:
    """Inputs (batch, 8) → logits (batch, 4)."""
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


torch.manual_seed(0)
base = build()
experts = {}
for name in ("one", "two"):
    experts[name] = build()
    experts[name].load_state_dict({k: v + 0.3 * torch.randn_like(v) for k, v in base.state_dict().items()})
inputs = {name: [torch.randn(16, 8) for _ in range(4)] for name in experts}

result = suture.adapt(build(), base, experts, inputs, granularity="layer", max_steps=20)
for task, values in zip(result.coefficients.tasks, result.coefficients.values, strict=True):
    print(task, [round(value, 3) for value in values.tolist()])
print(f"objective {result.losses[0]:.3f} → {result.losses[-1]:.3f}")
