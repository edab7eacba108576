"""Frozen weights that are converted once, in the place of autocast's conversions in every forward pass."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from suture.core.autocasting import autocast_dtype, frozen_weights_in
from suture.repairs import repair


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, tokens):
        q, k, v = self.up(self.norm(tokens)).chunk(3, -1)
        return tokens + self.down(nn.functional.scaled_dot_product_attention(q, k, v))


class Network(nn.Module):
    """What autocast treats in its own way."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, stride=2)
        self.layers = nn.ModuleList(Block() for _ in "ab")
        self.norm, self.head, self.scale = nn.LayerNorm(8), nn.Linear(8, 5), nn.Parameter(torch.ones(5))
        self.tied = nn.Embedding(5, 8)
        self.tied.weight = self.head.weight

    def forward(self, pictures):
        tokens = self.stem(pictures).flatten(2).mT
        for layer in self.layers:
            tokens = layer(tokens)
        return self.head(self.norm(tokens + self.tied(torch.arange(len(tokens[0])) % 5)).mean(1)) * self.scale


class Conversions(TorchDispatchMode):
    """Collects the shapes of float32 tensors that become bfloat16."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and result.dtype == torch.bfloat16:
            self.shapes.append(tuple(result.shape))
        return result


def autocast(module, inputs):
    with torch.autocast("cpu", torch.bfloat16):
        return module(inputs).float()


def network(seed=0):
    torch.manual_seed(seed)
    return Network().eval().requires_grad_(False)


def test_passes_have_the_same_bits_and_convert_no_weight_of_a_linear_layer():
    module, pictures = network(), torch.randn(4, 3, 8, 8)
    wanted, before = autocast(module, pictures), copy.deepcopy(module.state_dict())
    with frozen_weights_in(torch.bfloat16, module), Conversions() as seen:
        assert torch.equal(autocast(module, pictures), wanted)
    assert (8, 3, 2, 2) not in seen.shapes
    assert module.head.weight.dtype == torch.float32  # it is an embedding too
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_weights_with_gradients_and_those_of_other_dtypes_stay_as_they_are():
    module = network()
    module.stem.requires_grad_(True)
    module.layers[0].up.double()
    with frozen_weights_in(torch.bfloat16, module):
        assert module.stem.weight.dtype == torch.float32
        assert module.layers[0].up.weight.dtype == torch.float64
        assert module.layers[1].up.weight.dtype == torch.bfloat16
    with frozen_weights_in(None, module):
        assert module.layers[1].up.weight.dtype == torch.float32


@pytest.mark.parametrize("concatenate", [True, False])
def test_deep_surgery_under_autocast_gives_the_same_bits_with_fewer_conversions(concatenate, monkeypatch):
    experts = {task: network(i) for i, task in enumerate(("a", "b"), start=1)}
    inputs = {task: torch.randn(12, 3, 8, 8) for task in experts}

    def fitted():
        with Conversions() as seen:
            options = {"steps": 3, "batch_size": 4, "rank": 2, "forward": autocast, "concatenate": concatenate}
            return repair(network(), experts, inputs, "deep", **options), len(seen.shapes)

    once, few = fitted()
    monkeypatch.setattr("suture.repairs.deep.frozen_weights_in", lambda dtype, module: frozen_weights_in(None, module))
    always, many = fitted()
    assert torch.equal(once.losses, always.losses)
    passes, weights = 3 if concatenate else 6, 11  # of the stem, the blocks, and the head's bias
    assert many - few == (passes - 1) * weights


def test_the_weights_that_attention_of_torch_passes_on_stay_as_they_are():
    module = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16), nn.Linear(8, 8)).requires_grad_(False)
    with frozen_weights_in(torch.bfloat16, module):
        assert {parameter.dtype for parameter in module[0].parameters()} == {torch.float32}
        assert module[1].weight.dtype == torch.bfloat16


def test_the_dtype_of_autocast_is_known_where_it_is_on():
    assert autocast_dtype(torch.device("cpu")) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert autocast_dtype(torch.device("cpu")) == torch.bfloat16
