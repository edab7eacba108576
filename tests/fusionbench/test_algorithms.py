import pytest
import torch
from torch import nn

import suture
from suture.errors import ConfigError


def pool():
    torch.manual_seed(0)
    return {name: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)) for name in ("_pretrained_", "model_1", "model_2")}


def test_the_documented_example_runs():
    models = pool()
    before = {n: {k: t.clone() for k, t in m.state_dict().items()} for n, m in models.items()}
    algorithm = suture.TiesMergingAlgorithm(scaling_factor=0.3, threshold=20, remove_keys=[], merge_func="sum")
    merged = algorithm.run(models)
    assert isinstance(merged, nn.Sequential)
    expected = suture.merge(models["_pretrained_"], [models["model_1"], models["model_2"]], "ties_merging")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.state_dict().items())
    for name, model in models.items():
        assert all(torch.equal(tensor, before[name][k]) for k, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "algorithm", [suture.SimpleAverageAlgorithm(), suture.TaskArithmeticAlgorithm(scaling_factor=0.5)]
)
def test_the_average_of_two_is_half_of_both(algorithm):
    models = pool()
    merged = algorithm.run(models)
    torch.testing.assert_close(merged[0].weight, (models["model_1"][0].weight + models["model_2"][0].weight) / 2)


def test_a_pool_without_its_pretrained_model_is_refused():
    with pytest.raises(ConfigError, match="_pretrained_"):
        suture.SimpleAverageAlgorithm().run({"model_1": nn.Linear(1, 1)})


def test_an_unknown_argument_is_refused():
    with pytest.raises(ConfigError, match="Did you mean 'scaling_factor'"):
        suture.TaskArithmeticAlgorithm(scaling_facto=0.3)
