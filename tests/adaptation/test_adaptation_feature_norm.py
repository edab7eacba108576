"""Mean norms of features, the merged model's beside its experts'."""

import pytest
import torch
from torch import nn

from suture.adaptation import adapt, feature_norms, norm_drift
from suture.errors import ConfigError, DataError


def scaled(factor):
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Dropout(0.5))
    module[0].weight.data.copy_(factor * torch.eye(3))
    return module


def test_the_norms_are_means_over_the_inputs_in_evaluation_mode():
    inputs = {"a": torch.randn(100, 3), "b": {"input": torch.randn(5, 3)}}
    module, experts = scaled(3.0), {"a": scaled(1.0), "b": scaled(2.0)}
    norms = feature_norms(module, experts, inputs, num_inputs=100, batch_size=7)
    assert norms["a"].expert == pytest.approx(inputs["a"].norm(dim=1).mean().item(), rel=1e-6)
    assert norms["a"].ratio == pytest.approx(3)
    assert norms["b"].ratio == pytest.approx(1.5)
    assert module.training
    loaded = scaled(1.0)
    assert feature_norms(module, lambda task: loaded, inputs)["b"].ratio == pytest.approx(3)


def test_a_few_inputs_are_spread_over_all():
    inputs = torch.zeros(1000, 3)
    inputs[-1, 0] = 2.0
    norms = feature_norms(scaled(1.0), {"a": scaled(1.0)}, {"a": inputs}, num_inputs=2)
    assert norms["a"].merged == pytest.approx(1.0)  # the first and the last


def test_features_of_no_length_do_not_drift_from_features_of_no_length():
    inputs = {"a": torch.zeros(4, 3)}
    assert feature_norms(scaled(1.0), {"a": scaled(1.0)}, inputs)["a"].ratio == 1


def test_what_is_missing_is_refused():
    with pytest.raises(ConfigError, match=r"Task 'a' has inputs but no expert \(found: b\)"):
        feature_norms(scaled(1.0), {"b": scaled(1.0)}, {"a": torch.zeros(1, 3)})
    with pytest.raises(DataError, match="Task 'a' has no inputs"):
        feature_norms(scaled(1.0), {"a": scaled(1.0)}, {"a": torch.zeros(0, 3)})
    with pytest.raises(ConfigError, match="num_inputs=0"):
        feature_norms(scaled(1.0), {"a": scaled(1.0)}, {"a": torch.zeros(1, 3)}, num_inputs=0)


def test_entropy_behind_linear_heads_lengthens_features_and_says_so():
    torch.manual_seed(0)
    module, *tuned = (nn.Linear(6, 8) for _ in range(4))
    base = {name: torch.zeros_like(tensor) for name, tensor in module.state_dict().items()}
    experts = {f"t{i}": expert for i, expert in enumerate(tuned)}
    inputs = {task: torch.randn(64, 6) for task in experts}
    heads = {task: nn.Linear(8, 4) for task in experts}
    batches = {task: [rows] for task, rows in inputs.items()}
    for steps, lines in {0: 0, 100: 1}.items():
        result = adapt(module, base, experts, batches, heads, max_steps=steps, lr=0.1)
        module.load_state_dict(result.merged)
        drift = norm_drift(feature_norms(module, experts, inputs))
        assert len(drift) == lines
        assert all(line.startswith("Norm drift: the merged features of task 't") for line in drift)
