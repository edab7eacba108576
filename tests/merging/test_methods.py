"""Laws that hold for every registered method, and the registry itself."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from suture import merge, merge_files, open_checkpoint, preflight
from suture.errors import ConfigError
from suture.merging.counter_random import SlicePosition, uniforms
from suture.merging.registry import get_method, methods

METHODS = list(methods().values())
ON_A_SPHERE = {"slerp", "karcher", "nuslerp", "multislerp"}  # equal models come back to rounding
NOT_LINEAR = {*ON_A_SPHERE, "nearswap", "pcb"}  # in the size of the deltas
one_id = {"ids": lambda method: method.name}
every_method = pytest.mark.parametrize("method", METHODS, **one_id)
every_linear_method = pytest.mark.parametrize("method", [m for m in METHODS if m.name not in NOT_LINEAR], **one_id)
every_random_method = pytest.mark.parametrize("method", [m for m in METHODS if m.takes_position], **one_id)


def run(method, base, deltas, models="abcd", **knobs):
    """The method on as many of the deltas as it takes; the models' names count where it draws random numbers."""
    if method.matrices:
        tuned = [{"w": base + delta} for delta in deltas]
        return merge({"w": base}, tuned, method.name, **knobs)["w"]
    count = int(min(len(deltas), method.num_models[1]))
    deltas, position = deltas[:count], {"position": SlicePosition("w", models[:count])} if method.takes_position else {}
    operand = base + deltas if method.operand == "models" else deltas
    return method.function(base, operand, **position, **method.knobs.validate(knobs))


@pytest.fixture
def base(generator):
    return torch.randn(7, 5, generator=generator, dtype=torch.float64)


@pytest.fixture
def deltas(generator):
    return torch.randn(4, 7, 5, generator=generator, dtype=torch.float64)


@every_method
def test_models_that_did_not_drift_give_the_base(method, base, deltas):
    merged = run(method, base, torch.zeros_like(deltas))
    torch.testing.assert_close(merged, base, rtol=1e-14 if method.name in ON_A_SPHERE else 0, atol=0)


@every_method
def test_the_order_of_the_tasks_is_irrelevant(method, base, deltas):
    deltas = deltas[: int(min(4, method.num_models[1]))]
    names = "abcd"[: len(deltas)]
    backwards = run(method, base, deltas.flip(0), models=names[::-1])
    torch.testing.assert_close(run(method, base, deltas, models=names), backwards)


@every_method
def test_the_inputs_are_unchanged(method, base, deltas):
    before = base.clone(), deltas.clone()
    run(method, base, deltas)
    assert torch.equal(base, before[0])
    assert torch.equal(deltas, before[1])


@every_method
def test_the_same_inputs_give_the_same_bits(method, base, deltas):
    assert torch.equal(run(method, base, deltas), run(method, base, deltas))


@every_linear_method
def test_scaling_all_deltas_scales_the_result(method, base, deltas):
    torch.testing.assert_close(run(method, base, 2 * deltas) - base, 2 * (run(method, base, deltas) - base))


@every_method
def test_a_scalar_tensor_is_merged(method, base, deltas):
    merged = run(method, base[0, 0], deltas[:, 0, 0])
    assert merged.shape == ()


@every_method
def test_a_method_says_where_it_comes_from_and_what_it_does(method):
    assert method.paper.startswith("https://")
    assert method.knobs.summary.endswith(".")


@every_random_method
def test_chance_depends_on_seed_model_tensor_and_position(method, base, deltas):
    knobs, same = method.knobs.validate({}), deltas[:1].expand(3, -1, -1)
    merged = lambda seed=0, **position: method.function(
        base, same, position=SlicePosition(**{"tensor": "w", "models": "abc"} | position), **{**knobs, "seed": seed}
    )
    assert torch.equal(merged(), merged(models="bca"))
    for other in (merged(seed=1), merged(tensor="v"), merged(models="abd"), merged(start=1)):
        assert not torch.equal(merged(), other)


def test_dropping_and_rescaling_is_right_on_average():
    base, deltas = torch.zeros(200_000), torch.ones(1, 200_000)
    merged = run(get_method("dare"), base, deltas, scaling_factor=1.0, density=0.25)
    assert merged.unique().tolist() == [0, 4]
    assert merged.mean().item() == pytest.approx(1, abs=0.02)
    kept = run(get_method("dare"), base, deltas, scaling_factor=1.0, density=0.25, rescale=False)
    assert torch.equal(kept, merged / 4)


def test_uniform_numbers_of_two_models_have_nothing_in_common():
    drawn = uniforms(0, SlicePosition("w", ["a", "b"]), 100_000)
    assert 0 <= drawn.min() < 1e-4
    assert 1 - 1e-4 < drawn.max() < 1
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.005)
    assert abs(torch.corrcoef(drawn)[0, 1].item()) < 0.015
    assert abs(torch.corrcoef(torch.stack([drawn[0, 1:], drawn[0, :-1]]))[0, 1].item()) < 0.015


def test_della_keeps_large_entries_more_often_than_small_ones():
    deltas = torch.linspace(1, 2, 1000).expand(1, 300, 1000)
    knobs = {"density": 0.5, "epsilon": 0.4, "scaling_factor": 1.0}
    merged = run(get_method("della"), torch.zeros(300, 1000), deltas, **knobs)
    kept = (merged != 0).float().mean(0)
    torch.testing.assert_close(kept[:100].mean(), torch.tensor(0.14), rtol=0, atol=0.01)
    torch.testing.assert_close(kept[-100:].mean(), torch.tensor(0.86), rtol=0, atol=0.01)
    torch.testing.assert_close(merged.mean(0), deltas[0, 0], rtol=0, atol=1.2)
    torch.testing.assert_close(merged.mean(), deltas.mean(), rtol=0.01, atol=0)


def test_della_refuses_probabilities_out_of_range(base, deltas):
    with pytest.raises(ConfigError, match=r"density=0.5 ± method.epsilon=0.6 leaves the range"):
        run(get_method("della"), base, deltas, density=0.5, epsilon=0.6)


def test_dare_ties_with_everything_kept_is_ties_without_its_trim(base, deltas):
    kept = run(get_method("dare_ties"), base, deltas, density=1.0)
    torch.testing.assert_close(kept, run(get_method("ties_merging"), base, deltas, threshold=100))


def test_the_karcher_mean_of_two_directions_lies_halfway(base, deltas):
    one, two = base.flatten(), deltas[0].flatten()
    one, two = 2 * one / one.norm(), 2 * two / two.norm()
    karcher, slerp = get_method("karcher"), get_method("slerp")
    torch.testing.assert_close(karcher.function(one, torch.stack([one, two])), slerp.function(one, two[None], t=0.5))


def test_the_karcher_mean_balances_its_tangents(base, deltas):
    models = base + deltas
    mean = get_method("karcher").function(base, models, max_iter=100, tol=1e-12)
    units, mean = models.flatten(1) / models.flatten(1).norm(dim=1, keepdim=True), mean.flatten() / mean.norm()
    cosines = units @ mean
    tangents = (cosines.acos() / cosines.acos().sin())[:, None] * (units - cosines[:, None] * mean)
    assert tangents.sum(0).norm() < 1e-10


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 2000),
    st.lists(st.floats(0.1, 10) | st.floats(-10, -0.1), min_size=2, max_size=5),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 2**31),
)
def test_models_on_one_line_through_the_origin_stay_on_it(size, factors, dtype, seed):
    line = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    models = torch.stack([factor * line for factor in factors])
    sides, lengths = torch.tensor(factors).sign(), torch.tensor(factors).abs().mean().item()
    side = sides.sum().sign().item() or sides[0].item()  # without a majority the first model's
    karcher = get_method("karcher").function(line, models)
    torch.testing.assert_close(karcher, side * lengths * line, rtol=1e-4, atol=1e-5)
    one, two = factors[:2]
    nuslerp = get_method("nuslerp").function(line, models[:2], weights=[1.0, 3.0])
    torch.testing.assert_close(nuslerp, (one + 3 * two) / 4 * line, rtol=1e-4, atol=1e-5)
    slerp = get_method("slerp").function(line, models[:1], t=0.25)
    torch.testing.assert_close(slerp, (3 + one) / 4 * line, rtol=1e-4, atol=1e-5)
    if sides.sum() != 0:
        multislerp = get_method("multislerp").function(line, models)
        torch.testing.assert_close(multislerp, side * lengths * line, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        ([[1.0], [1.0], [-2.0], [1.0]], [1.25]),
        ([[1.0], [-1.0], [-1.0], [-1.0]], [-1.0]),
        ([[1.0, 2.0], [1.0, 2.0], [-1.0, -2.0]], [1.0, 2.0]),
    ],
)
def test_the_karcher_mean_of_exactly_opposite_models_by_hand(models, expected):
    merged = get_method("karcher").function(torch.zeros(len(expected)), torch.tensor(models))
    torch.testing.assert_close(merged, torch.tensor(expected))


@pytest.mark.parametrize(("name", "count"), [("slerp", 2), ("model_stock", 1), ("sce", 1)])
def test_a_number_of_models_that_cannot_be_merged_is_refused(name, count):
    with pytest.raises(ConfigError, match=rf"{name} merges .* beside the base; found {count}\."):
        merge({"w": torch.ones(2)}, [{"w": torch.ones(2)}] * count, name)
    base = open_checkpoint({"w": torch.ones(2)})
    found = preflight(base, {f"model_{i}": base for i in range(count)}, get_method(name))
    assert any(f"found {count}." in problem for problem in found.problems)


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


def test_breadcrumbs_drops_outliers_and_small_entries_by_hand():
    deltas = torch.tensor([[8.0, -1.0, 2.0, -4.0, 0.5], [1.0, 2.0, 3.0, 4.0, 5.0]])
    merged = run(get_method("breadcrumbs"), torch.zeros(5), deltas, scaling_factor=1.0, density=0.4, gamma=0.2)
    assert merged.tolist() == [0.0, 0.0, 5.0, 0.0, 0.0]


def test_model_stock_by_hand():
    deltas = torch.tensor([[2.0, 0.0], [1.0, 3**0.5]])  # 60° apart: t = 2·½ / (1 + ½)
    torch.testing.assert_close(run(get_method("model_stock"), torch.zeros(2), deltas), deltas.mean(0) * 2 / 3)


def test_sce_by_hand():
    deltas = torch.tensor([[4.0, 1.0, 2.0], [-2.0, 1.0, 2.0]])
    merged = run(get_method("sce"), torch.zeros(3), deltas, select_topk=1.0)
    torch.testing.assert_close(merged, torch.tensor([4.0, 1.0, 2.0]))
    assert run(get_method("sce"), torch.zeros(3), deltas, select_topk=0.0).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("count", "share", "selected"), [(100, 0.29, 29), (100, 0.57, 57), (1000, 0.001, 1), (7, 0.9, 6)]
)
def test_sce_selects_the_share_that_was_written(count, share, selected, generator):
    deltas = torch.randn(2, count, generator=generator)
    merged = run(get_method("sce"), torch.zeros(count), deltas, select_topk=share)
    assert merged.count_nonzero() == selected


def test_ties_and_breadcrumbs_round_a_share_as_the_published_code_does(generator):
    deltas = torch.rand(1, 100, generator=generator) + 1
    assert int(100 * 0.29) == 28
    ties = lambda **knobs: run(get_method("ties_merging"), torch.zeros(100), deltas, **knobs).count_nonzero()
    assert ties(threshold=29) == ties(threshold=0.29) == 28 + 1
    assert ties(threshold=29, scope="tensor") == 28
    assert run(get_method("breadcrumbs"), torch.zeros(100), deltas, density=0.29).count_nonzero() == 28


def test_no_knob_has_the_name_of_an_argument_of_the_merge():
    own = {name for verb in (merge, merge_files) for name in inspect.signature(verb).parameters}
    knobs = {(name, knob) for name, method in methods().items() for knob in method.knobs.defaults}
    assert not {(name, knob) for name, knob in knobs if knob in own}
