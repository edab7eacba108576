"""Mixtures of inputs: their values, dtypes and seeds, and a distillation on them."""

import pytest
import torch
from torch import nn

from suture.errors import ConfigError
from suture.repairs import repair
from suture.repairs.mixtures import with_mixtures


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.uint8])
def test_mixtures_lie_between_two_inputs_and_follow_the_inputs_themselves(dtype):
    inputs = torch.tensor([[0.0, 0.0], [100.0, 100.0]]).to(dtype)
    found = with_mixtures(inputs, 50, "t", 0)
    assert found.dtype == dtype
    assert found.shape == (102, 2)
    assert torch.equal(found[:2], inputs)
    assert torch.equal(found[:, 0], found[:, 1])  # one share for the whole input
    shares = found[2:, 0].double() / 100
    assert 0 <= shares.min() < 0.1
    assert 0.9 < shares.max() <= 1
    assert 0.3 < shares.mean() < 0.7


def test_the_seed_and_the_task_decide_the_mixtures_and_none_leave_the_inputs_alone():
    inputs = torch.randn(9, 3)
    assert with_mixtures(inputs, 0, "t", 0) is inputs
    one, same, other, task = (
        with_mixtures(inputs, 2, name, seed) for name, seed in [("t", 0), ("t", 0), ("t", 1), ("s", 0)]
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(one, task)
    assert torch.equal(with_mixtures(inputs, 1, "t", 0), one[:18]), "fewer are a part of more"


def test_a_distillation_learns_the_experts_features_of_the_mixtures():
    torch.manual_seed(0)
    module, expert = (nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)) for _ in range(2))
    inputs, seen = {"t": torch.randn(4, 3)}, []
    expert.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    options = {"steps": 300, "lr": 0.02, "batch_size": 4}
    mixed = repair(module, {"t": expert}, inputs, "distil", mixed=20, **options)
    assert torch.equal(torch.cat(seen), with_mixtures(inputs["t"], 20, "t", 0))
    plain = repair(module, {"t": expert}, inputs, "distil", **options)
    between = with_mixtures(inputs["t"], 50, "t", 9)
    distance = [float((r.model(between, "t") - expert(between)).abs().mean().detach()) for r in (mixed, plain)]
    assert distance[0] < distance[1]


@pytest.mark.parametrize(
    ("inputs", "found"), [(torch.ones(4, 3, dtype=torch.long), "int64"), ({"x": torch.randn(4, 3)}, "dict")]
)
def test_inputs_with_nothing_between_them_are_refused(inputs, found):
    with pytest.raises(ConfigError, match=f"mixed=1: the inputs of task 't' are {found}"):
        with_mixtures(inputs, 1, "t", 0)
