"""The objectives of adaptation, by hand."""

import math

import pytest
import torch

from suture.adaptation import entropy, entropy_epsilon, expert_cross_entropy, expert_feature_l1


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
