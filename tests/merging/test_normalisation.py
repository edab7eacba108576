"""Statistics measured anew: equal to those by hand, whatever the batches, and nothing else is touched."""

import pytest
import torch
from torch import nn

import suture
from suture.errors import ConfigError, DataError


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3),
        nn.BatchNorm2d(5),
        nn.Dropout(),
        nn.Flatten(),
    )


@pytest.fixture
def inputs(generator):
    return 3 + torch.randn(23, 3, 8, 8, generator=generator)


@torch.no_grad()
def test_the_statistics_are_those_by_hand_in_float64(network, inputs):
    found = suture.reestimate_statistics(network, inputs.split(7))
    by_hand = network.double().eval()
    for at in (1, 4):
        values = by_hand[:at](inputs.double()).transpose(0, 1).flatten(1)
        by_hand[at].running_mean, by_hand[at].running_var = values.mean(1), values.var(1, unbiased=True)
    for at in (1, 4):
        torch.testing.assert_close(found[f"{at}.running_mean"].double(), by_hand[at].running_mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[f"{at}.running_var"].double(), by_hand[at].running_var, rtol=1e-5, atol=1e-6)


def test_one_layer_in_float64_is_exact(generator):
    values = 1e4 + torch.randn(50, 3, generator=generator, dtype=torch.float64)
    found = suture.reestimate_statistics(nn.BatchNorm1d(3).double(), values.split(9))
    torch.testing.assert_close(found["running_mean"], values.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(found["running_var"], values.var(0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("batch_size", [1, 2, 10])
def test_neither_the_size_nor_the_order_of_the_batches_matters(network, inputs, batch_size):
    network = network.double()
    whole = suture.reestimate_statistics(network, [inputs.double()])
    parts = suture.reestimate_statistics(network, inputs.double().flip(0).split(batch_size))
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-12, atol=1e-12)


def test_a_loaded_result_normalises_every_layer_s_inputs(network, inputs):
    network.load_state_dict(suture.reestimate_statistics(network, [inputs]), strict=False)
    outputs = network.eval()[:5](inputs).transpose(0, 1).flatten(1)
    torch.testing.assert_close(outputs.mean(1), torch.zeros(5), rtol=0, atol=1e-4)
    torch.testing.assert_close(outputs.var(1), torch.ones(5), rtol=1e-3, atol=0)


def test_the_module_is_left_as_it_is(network, inputs):
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    found = suture.reestimate_statistics(network, [inputs])
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(part.training and not part._forward_pre_hooks for part in network.modules())
    assert set(found) == {f"{at}.running_{kind}" for at in (1, 4) for kind in ("mean", "var")}
    assert not any(torch.equal(found[name], before[name]) for name in found)


def test_keyword_batches_and_a_forward_of_one_s_own(network, inputs):
    plain = suture.reestimate_statistics(network, [inputs])
    keyword = suture.reestimate_statistics(network, [{"input": inputs}])
    paired = suture.reestimate_statistics(network, [(inputs, 0)], forward=lambda module, batch: module(batch[0]))
    for name in plain:
        assert torch.equal(plain[name], keyword[name])
        assert torch.equal(plain[name], paired[name])


def test_layers_that_the_inputs_do_not_reach_are_not_in_the_result(network, inputs):
    network.add_module("unused", nn.BatchNorm1d(2))
    found = suture.reestimate_statistics(network, [inputs], forward=lambda module, batch: module[:5](batch))
    assert "unused.running_mean" not in found
    assert "4.running_mean" in found


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x):
        return self.norm(self.norm(x))


@pytest.mark.parametrize(
    ("module", "batches", "error", "says"),
    [
        (nn.Linear(2, 2), [torch.ones(3, 2)], ConfigError, "Linear has no BatchNorm layer that keeps statistics"),
        (nn.BatchNorm1d(2, track_running_stats=False), [torch.ones(3, 2)], ConfigError, "has no BatchNorm layer"),
        (nn.InstanceNorm1d(2, track_running_stats=True), [torch.ones(3, 2)], ConfigError, "has no BatchNorm layer"),
        (Twice(), [torch.ones(3, 2)], ConfigError, "'norm' is used more than once"),
        (nn.BatchNorm1d(2), iter([torch.ones(3, 2)]), ConfigError, "give a list of batches"),
        (nn.BatchNorm1d(2), [(torch.ones(3, 2), 0)], ConfigError, "A batch is a tuple"),
        (nn.BatchNorm1d(2), [], DataError, "There are no batches"),
        (nn.BatchNorm1d(2), [torch.ones(1, 2)], DataError, "a variance needs 2 or more"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(module, batches, error, says):
    with pytest.raises(error, match=says) as caught:
        suture.reestimate_statistics(module, batches)
    assert "\n" not in str(caught.value)
