"""Copies of a network that share batches: the results of one, in order."""

import pytest
import torch
from torch import nn

from suture.core.replicas import on_replicas
from suture.evaluation import Scorer, TaskInputs
from suture.repairs import Problem, repair_kinds
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


class Blocks(nn.Module):
    """Three residual blocks and a feature."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.GELU()) for _ in range(3))
        self.feature = nn.Linear(6, 4)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.feature(x)


def several_tasks(count=3):
    """A merged module, experts that are loaded into one shared module, and inputs of some tasks."""
    torch.manual_seed(0)
    merged, shared = Blocks().eval(), Blocks().eval()
    tune = lambda tensor: tensor + 0.1 * torch.randn_like(tensor)
    states = {f"t{i}": {name: tune(tensor) for name, tensor in merged.state_dict().items()} for i in range(count)}
    inputs = {name: torch.randn(11 + i, 6) for i, name in enumerate(states)}

    def expert(name):
        shared.load_state_dict(states[name])
        return shared

    return merged, expert, inputs


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize(
    ("kind", "knobs"), [("final", {"steps": 5}), ("deep", {"steps": 5}), ("calibrate", {}), ("calibrate", {"mix": 1})]
)
@pytest.mark.parametrize("cached", [False, True])
def test_several_devices_repair_as_one_does(tmp_path, kind, knobs, devices, cached):
    found = []
    for number in (1, devices):
        options = {"encode_batch": 4, "devices": [CPU] * number, "cache": tmp_path / str(number) if cached else None}
        problem = Problem(*several_tasks(), **options)
        result = repair_kinds()[kind].function(problem, **knobs)
        found.append((result, problem.passes))
    (one, passes), (several, others) = found
    assert torch.equal(one.losses, several.losses)
    assert passes == others
    rows = torch.randn(9, 6, generator=torch.Generator().manual_seed(2))
    merged = several_tasks()[0](rows)
    for task in ("t0", "t1", "t2"):
        repaired = one.model.for_task(task)(rows)
        assert torch.equal(repaired, several.model.for_task(task)(rows))
        assert not torch.equal(repaired, merged)


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
