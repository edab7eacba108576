"""Processes over gloo, and a small problem that they solve together."""

import torch
from torch import nn

from suture import repair
from suture.core.fabric import make_fabric

TASKS = 3


def processes(number, strategy="ddp_fork"):
    return make_fabric({"accelerator": "cpu", "devices": number, "strategy": strategy})


class Blocks(nn.Module):
    """Three residual blocks and a feature; in float64, so that rounding is far below any difference that matters."""

    def __init__(self, norm=nn.LayerNorm):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(norm(6), nn.Linear(6, 6), nn.GELU()) for _ in range(3))
        self.feature = nn.Linear(6, 4)
        self.double().eval()

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.feature(x)


def models_and_inputs(norm=nn.LayerNorm):
    """A merged module, its experts, and inputs of different numbers."""
    torch.manual_seed(0)
    merged = Blocks(norm)
    experts = {f"t{i}": Blocks(norm) for i in range(TASKS)}
    inputs = {name: torch.randn(21 + i, 6).double() for i, name in enumerate(experts)}
    return merged, experts, inputs


def repaired(kind, knobs, fabric=None, norm=nn.LayerNorm, **options):
    """Losses, warnings, passes, and the repaired features of other inputs."""
    merged, experts, inputs = models_and_inputs(norm)
    given = {"encode_batch": 4, "base": {name: 0.9 * t for name, t in merged.state_dict().items()}, "fabric": fabric}
    result = repair(merged, experts, inputs, kind, **given, **options, **knobs)
    rows = torch.randn(9, 6, generator=torch.Generator().manual_seed(2)).double()
    with torch.no_grad():
        features = torch.stack([result.model.for_task(task)(rows) for task in experts])
    return result.losses, features, result.warnings, (result.passes.merged, result.passes.experts)
