"""Copies of a network that share batches: the results of one, in order."""

import pytest
import torch
from torch import nn

from suture.core.replicas import on_replicas
from suture.evaluation import Scorer, TaskInputs
from suture.repairs import Problem
from suture.repairs.network import find_blocks

CPU = torch.device("cpu")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 4))


def task(count=23):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 6, generator=generator)
    return TaskInputs("t", inputs, torch.randint(0, 4, (count,), generator=generator))


@pytest.mark.parametrize("devices", [2, 4])
def test_several_devices_score_as_one_does(devices):
    module = network()
    take = lambda scorer: scorer.each_batch(module, task(), lambda logits, labels: logits)
    assert torch.equal(take(Scorer(5)), take(Scorer(5, devices=[CPU] * devices)))
    assert module.training
    assert torch.equal(Scorer(5).correct(module, task()), Scorer(5, devices=[CPU] * devices).correct(module, task()))


@pytest.mark.parametrize("devices", [2, 4])
def test_several_devices_encode_as_one_does(devices):
    module, inputs = network().eval(), task().inputs
    one = Problem(module, {"t": module}, {"t": inputs}, encode_batch=5)
    several = Problem(module, {"t": module}, {"t": inputs}, encode_batch=5, devices=[CPU] * devices)
    assert torch.equal(one.merged_rows("t", inputs), several.merged_rows("t", inputs))
    blocks = find_blocks(module, inputs, blocks=["0", "2"])
    with_blocks = [problem.merged_rows("t", inputs, blocks) for problem in (one, several)]
    assert with_blocks[0].shape == (23, 16 + 16 + 4)
    assert torch.equal(*with_blocks)
    assert several.passes == one.passes


def test_every_copy_has_its_share_and_none_is_the_module_itself():
    module, seen = network(), []
    results = list(on_replicas(module, [CPU] * 3, lambda copy, item: seen.append(id(copy)) or item, range(10)))
    assert results == list(range(10))
    assert sorted(map(seen.count, set(seen))) == [3, 3, 4]
    assert id(module) not in seen


def test_an_error_on_a_device_reaches_the_caller():
    def fail(copy, item):
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item 0"):
        list(on_replicas(network(), [CPU] * 2, fail, range(9)))
