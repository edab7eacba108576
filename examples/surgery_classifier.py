"""Repair of a BERT-like classifier: a small transformer encoder, merged, then repaired after every block."""

import torch
from torch import nn

import suture


class Classifier(nn.Module):
    """Token ids (batch, length) → features (batch, 32): the mean over positions, as sentence encoders take it."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(100, 32)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True) for _ in range(2)
        )

    def forward(self, ids):
        hidden = self.tokens(ids)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden.mean(1)


torch.manual_seed(0)
base = Classifier().eval()
experts = {name: Classifier().eval() for name in ("reviews", "questions")}
for expert in experts.values():
    expert.load_state_dict({k: v + 0.05 * torch.randn_like(v) for k, v in base.state_dict().items()})
merged = Classifier().eval()
merged.load_state_dict(suture.merge(base, experts, "task_arithmetic"))
inputs = {name: torch.randint(0, 100, (32, 12)) for name in experts}

repaired = suture.repair(merged, experts, inputs, "deep", rank=4, steps=30)
for task, losses in zip(inputs, repaired.losses.T.tolist(), strict=True):
    print(f"{task}: L1 to the expert, summed over blocks, {losses[0]:.3f} → {losses[-1]:.3f}")
print(repaired.model(inputs["reviews"], "reviews").shape)
