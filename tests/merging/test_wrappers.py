"""Wrappers around merges: the reference vectors, laws, and what they refuse."""

import pytest
import torch

from suture import merge, methods
from suture.errors import ConfigError
from suture.merging.blocks import block_depths
from suture.merging.wrapping import chosen_wrappers, wrappers
from tests.support import second_family

OVER = {
    "task_arithmetic": ("task_arithmetic", {"scaling_factor": 0.3}),
    "tsv_m": ("tsv_m", {}),
    "ties": ("ties_merging", {"scaling_factor": 0.3}),
    "sum": ("task_arithmetic", {}),
    "ties_sum": ("ties_merging", {}),
}
CASES = second_family.names("weights", "svc", "lines")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_wrapper_gives_the_reference_vectors(case, dtype):
    base, models, roles = second_family.inputs(case)
    given = second_family.INDEX[case]
    method, knobs = OVER[given["knobs"]["over"]]
    named = {"as_vector": [n for n, role in roles.items() if role == "vector"]}
    named["as_matrix"] = [n for n in roles if n not in named["as_vector"]]
    own = {"beta": 0.4} if given["method"] == "lines" else {"alpha": given["knobs"]["alpha"], **named}
    zero = {name: torch.zeros(tensor.shape, dtype=dtype) for name, tensor in base.items()}
    deltas = {key: {n: (t - base[n]).to(dtype) for n, t in model.items()} for key, model in models.items()}
    merged = merge(zero, deltas, method, after={given["method"]: own}, **knobs, **(named if method == "tsv_m" else {}))
    for name, tensor in second_family.part(case, "merged").items():
        expected = tensor - base[name]
        tolerance = 1e-11 if dtype == torch.float64 else 1e-4 * float(expected.abs().max())
        torch.testing.assert_close(merged[name].double(), expected, rtol=0, atol=tolerance)


@pytest.fixture
def models(generator):
    shapes = {
        "layers.0.a.weight": (70, 90),
        "layers.0.a.bias": (70,),
        "layers.2.b.weight": (90, 70),
        "c.weight": (9, 5),
    }
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    noise = lambda t: t + 0.1 * torch.randn(t.shape, generator=generator)
    return base, [{name: noise(t) for name, t in base.items()} for _ in range(3)]


@pytest.mark.parametrize("wrapper", sorted(wrappers()))
@pytest.mark.parametrize("method", sorted(methods()))
def test_a_wrapper_goes_around_every_method_and_no_thread_changes_a_bit(wrapper, method, models):
    base, tuned = models
    tuned = tuned[: int(min(3, methods()[method].num_models[1]))]
    knobs = {"steps": 3} if method == "wudi" else {}
    before = [{name: t.clone() for name, t in model.items()} for model in (base, *tuned)]
    one = merge(base, tuned, method, after=[wrapper], threads=1, **knobs)
    two = merge(base, tuned, method, after=wrapper, threads=2, **knobs)
    assert all(torch.equal(one[name], two[name]) and one[name].isfinite().all() for name in base)
    unmoved = merge(base, [base] * len(tuned), method, after=[wrapper], **knobs)
    assert all(torch.allclose(unmoved[name], base[name]) for name in base)
    after = [base, *tuned]
    assert all(torch.equal(old[name], new[name]) for old, new in zip(before, after, strict=True) for name in base)


def test_wrappers_act_in_their_order(models):
    base, tuned = models

    def update(after):  # at scale 1, which is that of LiNeS
        merged = merge(base, tuned, "task_arithmetic", scaling_factor=1.0, after=after)
        return {name: tensor - base[name] for name, tensor in merged.items()}

    svc, both = update({"svc": {}}), update({"svc": {}, "lines": {"alpha": 0.5, "beta": 0.25}})
    for name, factor in [("c.weight", 0.5), ("layers.0.a.weight", 0.5), ("layers.2.b.weight", 0.75)]:
        torch.testing.assert_close(both[name], factor * svc[name], rtol=1e-4, atol=1e-5)


def test_lines_takes_the_update_at_scale_one_over_the_whole_model(models):
    base, tuned = models
    sums = {name: sum(model[name] - base[name] for model in tuned) for name in base}
    merged = merge(base, tuned, "task_arithmetic", after=["lines"], scaling_factor=7.0)
    for name, factor in [("c.weight", 1 / 3), ("layers.0.a.bias", 1 / 3), ("layers.2.b.weight", 1 / 3 + 0.2)]:
        torch.testing.assert_close(merged[name] - base[name], factor * sums[name], rtol=1e-4, atol=1e-5)
    mean = merge(base, tuned, "model_stock")
    ratio = sum(t.abs().sum() for t in sums.values()) / sum((mean[n] - base[n]).abs().sum() for n in base) / 3
    merged = merge(base, tuned, "model_stock", after={"lines": {"beta": 0.0}})
    for name in base:
        torch.testing.assert_close(merged[name] - base[name], ratio * (mean[name] - base[name]), rtol=1e-3, atol=1e-4)


def test_svc_gives_one_expert_back_and_does_not_see_the_scale(models):
    base, tuned = models
    one = merge(base, tuned[:1], "task_arithmetic", after=["svc"], scaling_factor=0.01)
    name = "layers.0.a.weight"
    torch.testing.assert_close(one[name], base[name] + 0.1 * (tuned[0][name] - base[name]), rtol=0, atol=1e-5)
    expert = merge(base, tuned[:1], "task_arithmetic", after=["svc"], scaling_factor=0.3)
    torch.testing.assert_close(expert[name], tuned[0][name], rtol=0, atol=1e-5)
    split = merge(base, tuned, "task_arithmetic", after={"svc": {"split": {name: 2}}})
    halves = [
        merge({name: base[name][r]}, [{name: m[name][r]} for m in tuned], "task_arithmetic", after=["svc"])
        for r in (slice(0, 35), slice(35, 70))
    ]
    torch.testing.assert_close(split[name], torch.cat([half[name] for half in halves]))


@pytest.mark.parametrize(
    ("names", "depths"),
    [
        (["visual.transformer.resblocks.1.mlp.c_fc.weight", "visual.proj"], [0, 0]),
        (["encoder.block.0.layer.1.wi.weight", "encoder.block.4.layer.0.q.weight"], [0, 1]),
        (["net.3.layers.0.w", "net.3.layers.1.w", "net.3.layers.2.w"], [0, 0.5, 1]),
        (["stages.0.blocks.0.w", "stages.0.blocks.1.w", "stages.1.blocks.0.w"], [0, 0.5, 1]),
        (["text.layers.0.w", "text.layers.1.w", "vision.layers.0.w", "vision.layers.2.w", "vision.layers.1.w"],
         [0, 1, 0, 1, 0.5]),
        (["11.mlp.0.w", "0.mlp.0.w", "10.mlp.3.w", "embed.w"], [1, 0, 0.5, 0]),
    ],
)  # fmt: skip
def test_the_block_is_the_number_after_the_container(names, depths):
    depth = block_depths(names)
    assert list(map(depth, names)) == depths


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (["scv"], r"Unknown wrapper 'scv'\. Did you mean 'svc'"),
        ({"svc": {"alpha": 0}}, r"svc.alpha=0 does not fit svc: .*greater than 0"),
        ({"svc": {"beta": 1}}, r"knob of svc"),
        ({"svc": 0.2}, r"method.after.svc=0.2 is no mapping. Remedy: give its knobs"),
        ({"svc": {"as_vector": ["x"]}}, r"'x', which is the name of no tensor"),
    ],
)
def test_what_is_no_wrapper_is_refused_in_one_line(after, message, models):
    with pytest.raises(ConfigError, match=message) as caught:
        merge(*models, "task_arithmetic", after=after)
    assert "\n" not in str(caught.value)


def test_no_wrapper_is_no_wrapper():
    with pytest.raises(ConfigError, match=r"method.after=3: wanted names of wrappers"):
        chosen_wrappers(3)
    assert chosen_wrappers(None) == chosen_wrappers([]) == []
