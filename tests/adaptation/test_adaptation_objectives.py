"""The objectives of adaptation, by hand."""

import math

import pytest
import torch
from torch import nn

from suture.adaptation import adapt, entropy, entropy_epsilon, expert_cross_entropy, expert_feature_l1
from suture.errors import ConfigError


@pytest.mark.parametrize("function", [entropy, entropy_epsilon])
def test_the_entropy_of_even_odds_is_the_log_of_their_number(function):
    assert function(torch.zeros(2, 8, dtype=torch.float64)).item() == pytest.approx(math.log(8), abs=1e-6)


def test_the_two_entropies_differ_by_the_epsilon_only():
    logits = torch.tensor([[2.0, 0.0, -1.0]], dtype=torch.float64)
    p = logits.softmax(-1)
    assert entropy(logits).item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-15)
    assert (entropy(logits) - entropy_epsilon(logits)).item() == pytest.approx(3e-8, abs=1e-9)


def test_a_certain_prediction_has_entropy_zero_and_a_finite_gradient():
    logits = torch.tensor([[900.0, 0.0]], requires_grad=True)
    entropy(logits).backward()
    assert entropy(logits).item() == 0
    assert logits.grad.isfinite().all()


def test_the_expert_s_prediction_is_the_label():
    logits, expert = torch.tensor([[1.0, 3.0]]), torch.tensor([[9.0, 0.0]])
    assert expert_cross_entropy(logits, expert).item() == pytest.approx(math.log(1 + math.exp(2)), rel=1e-6)


def test_the_feature_distance_is_a_mean_over_everything():
    assert expert_feature_l1(torch.tensor([[1.0, -1.0], [0.0, 0.0]]), torch.zeros(2, 2)).item() == 0.5


def pixels(classes=5, tasks=2):
    """A network that gives logits (batch, class, height, width), its experts, and a batch a task."""
    torch.manual_seed(0)
    module, *experts = (nn.Conv2d(3, classes, 1) for _ in range(tasks + 1))
    models = {f"t{i}": expert for i, expert in enumerate(experts)}
    return module, module, models, {task: [torch.randn(2 + i, 3, 4, 4)] for i, task in enumerate(models)}


def a_row_a_pixel(module, inputs):
    return module(inputs).movedim(1, -1).flatten(0, -2)


@pytest.mark.parametrize("objective", ["entropy", "entropy_epsilon", "expert_cross_entropy"])
@pytest.mark.parametrize("concatenate", [True, False])
def test_dense_logits_are_refused_until_there_is_a_row_for_each_prediction(objective, concatenate):
    options = {"objective": objective, "concatenate": concatenate, "max_steps": 2}
    with pytest.raises(ConfigError, match=r"\(batch, class\); found the shape \(\d, 5, 4, 4\)\. Remedy: .*flatten"):
        adapt(*pixels(), **options)
    result = adapt(*pixels(), forward=a_row_a_pixel, **options)
    module, _, models, batches = pixels()
    if objective == "entropy":
        module.load_state_dict(adapt(*pixels(), forward=a_row_a_pixel, max_steps=0).merged)
        loss = sum(entropy(a_row_a_pixel(module, batches[task][0])) for task in models)
        assert result.losses[0].item() == pytest.approx(loss.item(), rel=1e-5)


def test_dense_logits_give_the_same_in_one_pass_and_in_small_ones():
    options = {"forward": a_row_a_pixel, "max_steps": 3, "lr": 0.1}
    together = adapt(*pixels(), concatenate=True, **options).history
    for other in ({"concatenate": False}, {"concatenate": True, "micro_batch": 1}):
        torch.testing.assert_close(adapt(*pixels(), **options, **other).history, together)


def test_rows_that_belong_to_no_input_are_refused():
    with pytest.raises(ConfigError, match="`forward` gives 4 rows for 5 inputs"):
        adapt(*pixels(), forward=lambda module, inputs: module(inputs).mean((2, 3))[1:], max_steps=1, concatenate=True)


@pytest.mark.parametrize("function", [entropy, entropy_epsilon, lambda z: expert_cross_entropy(z, z)])
def test_one_class_has_nothing_to_learn_from(function):
    with pytest.raises(ConfigError, match=r"two classes or more; found the shape \(3, 1\)"):
        function(torch.randn(3, 1))
    z = torch.randn(3, 1)
    assert function(torch.cat([torch.zeros_like(z), z], 1)).item() > 0
