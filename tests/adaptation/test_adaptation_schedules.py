"""The learning rate over an adaptation: constant as published, or fast."""

import pytest
import torch
from torch import nn

from suture import adapt
from suture.adaptation.schedules import SCHEDULES, get_schedule
from suture.errors import ConfigError


def problem(tasks=3):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).eval()
    base = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    models = {f"t{i}": {n: w + 0.3 * torch.randn_like(w) for n, w in base.items()} for i in range(tasks)}
    return module, base, models, {task: [torch.randn(8, 6) for _ in range(4)] for task in models}


def reach(schedule, steps=None):
    factor, steps = get_schedule(schedule, steps)
    return sum(factor(step, steps) for step in range(steps))


def test_the_default_is_the_published_schedule():
    assert get_schedule("constant")[1] == 1000
    module, base, models, batches = problem()
    plain = adapt(module, base, models, batches, max_steps=3)
    assert plain.history.equal(adapt(module, base, models, batches, max_steps=3, schedule="constant").history)


def test_fast_reaches_as_far_as_a_thousand_steps_in_a_fifth_of_them():
    assert get_schedule("fast")[1] == 200
    assert reach("constant") <= reach("fast") < 1.25 * reach("constant")


@pytest.mark.parametrize("steps", [1, 2, 7, 200])
def test_fast_rises_once_then_falls_and_never_stops(steps):
    rates = [SCHEDULES["fast"](step, steps) for step in range(steps)]
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert min(rates) > 0


def test_each_step_has_the_schedule_s_rate():
    module, base, models, batches = problem()
    result = adapt(module, base, models, batches, schedule="fast", optimizer="sgd", max_steps=6)
    slow = adapt(module, base, models, batches, optimizer="sgd", max_steps=1)
    moved, first = result.history[1] - result.history[0], slow.history[1] - slow.history[0]
    torch.testing.assert_close(moved, SCHEDULES["fast"](0, 6) * first)


def test_fast_lowers_the_objective_further_in_a_fifth_of_the_steps():
    module, base, models, batches = problem()
    constant = adapt(module, base, models, batches, max_steps=200)
    fast = adapt(module, base, models, batches, schedule="fast", lr=1e-3, max_steps=40)
    mean = lambda result: sum(
        adapt(
            module, base, models, {t: [b[i]] for t, b in batches.items()}, init_values=result.coefficients, max_steps=1
        )
        .losses[0]
        .item()
        for i in range(4)
    )
    assert mean(fast) < mean(constant)


def test_the_same_inputs_give_the_same_bits():
    module, base, models, batches = problem()
    runs = [adapt(module, base, models, batches, schedule="fast", max_steps=5) for _ in range(2)]
    assert runs[0].history.equal(runs[1].history)


def test_an_unknown_schedule_is_refused_in_one_line():
    with pytest.raises(ConfigError, match="slow"):
        get_schedule("slow")
