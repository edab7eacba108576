"""Laws that hold for every registered method, and the registry itself."""

import pytest
import torch

from suture.errors import ConfigError
from suture.methods import get_method, methods

METHODS = list(methods().values())
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


def run(method, base, deltas, **knobs):
    operand = base + deltas if method.operand == "models" else deltas
    return method.function(base, operand, **method.knobs.validate(knobs))


@pytest.fixture
def base(generator):
    return torch.randn(7, 5, generator=generator, dtype=torch.float64)


@pytest.fixture
def deltas(generator):
    return torch.randn(4, 7, 5, generator=generator, dtype=torch.float64)


@every_method
def test_models_that_did_not_drift_give_the_base(method, base, deltas):
    assert torch.equal(run(method, base, torch.zeros_like(deltas)), base)


@every_method
def test_the_order_of_the_tasks_is_irrelevant(method, base, deltas):
    torch.testing.assert_close(run(method, base, deltas), run(method, base, deltas.flip(0)))


@every_method
def test_the_inputs_are_unchanged(method, base, deltas):
    before = base.clone(), deltas.clone()
    run(method, base, deltas)
    assert torch.equal(base, before[0])
    assert torch.equal(deltas, before[1])


@every_method
def test_the_same_inputs_give_the_same_bits(method, base, deltas):
    assert torch.equal(run(method, base, deltas), run(method, base, deltas))


@every_method
def test_scaling_all_deltas_scales_the_result(method, base, deltas):
    torch.testing.assert_close(run(method, base, 2 * deltas) - base, 2 * (run(method, base, deltas) - base))


@every_method
def test_a_scalar_tensor_is_merged(method, base, deltas):
    merged = run(method, base[0, 0], deltas[:, 0, 0])
    assert merged.shape == ()


@every_method
def test_a_method_says_where_it_comes_from_and_what_it_does(method):
    assert method.paper.startswith("https://arxiv.org/abs/")
    assert method.knobs.summary.endswith(".")


def test_the_weight_average_is_the_mean_of_the_models(base, deltas):
    torch.testing.assert_close(run(get_method("simple_average"), base, deltas), (base + deltas).mean(0))


def test_task_arithmetic_by_hand():
    base, deltas = torch.tensor([1.0, 1.0]), torch.tensor([[1.0, 2.0], [3.0, -2.0]])
    assert run(get_method("task_arithmetic"), base, deltas, scaling_factor=0.5).tolist() == [3.0, 1.0]


def test_an_alias_names_the_same_method():
    assert get_method("weight_averaging") is get_method("simple_average")


def test_an_unknown_method_is_answered_with_the_nearest_names():
    with pytest.raises(ConfigError, match=r"Unknown method 'ties_mergin'\. Did you mean 'ties_merging'"):
        get_method("ties_mergin")


@pytest.mark.parametrize(
    ("knob", "value", "says"),
    [
        ("merge_func", "avrage", "'sum', 'mean' or 'max'"),
        ("threshold", -5, "greater than 0"),
        ("threshold", 101, "less than or equal to 100"),
        ("scaling_factor", "abc", "valid number"),
        ("scaling_factor", float("nan"), "finite"),
        ("scaling_facto", 0.3, "Did you mean 'scaling_factor'"),
    ],
)
def test_a_bad_value_is_refused_in_one_line(knob, value, says):
    with pytest.raises(ConfigError, match=says) as caught:
        get_method("ties_merging").knobs.validate({knob: value})
    assert "\n" not in str(caught.value)
    assert knob in str(caught.value)


def test_defaults_are_those_of_the_signature():
    knobs = get_method("ties_merging").knobs.validate({})
    assert (knobs["scaling_factor"], knobs["threshold"], knobs["merge_func"], knobs["scope"]) == (
        0.3,
        20.0,
        "sum",
        "model",
    )
