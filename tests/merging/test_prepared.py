"""Prepare once, apply often: the bits of a merge at that scale."""

import pytest
import torch

from suture import merge, methods
from suture.checkpoints import allocate_checkpoint, open_checkpoint
from suture.errors import ConfigError, IncompatibleModels
from suture.merging.prepared import apply, prepare, update_specs
from suture.merging.task_vectors import open_task_vectors

SCALED = sorted(name for name, method in methods().items() if method.scale)
KNOBS = {
    "wudi": [{"steps": 3}],
    "ties_merging": [{}, {"merge_func": "mean", "scope": "tensor"}, {"merge_func": "max"}],
    "cart": [{"rank_ratio": 0.5}],
    "task_arithmetic": [{}, {"weights": [1.0, 0.5, 2.0]}],
    "tsv_m": [{}, {"vectors": "base", "remove_keys": ["b"]}],
}


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float64], ids=str)
def models(request, generator):
    shapes = {"a.weight": (70, 90), "b": (40,), "c.weight": (12, 8), "s": (), "e": (0, 3)}
    base = {name: torch.randn(shape, generator=generator).to(request.param) for name, shape in shapes.items()}
    noise = lambda t: (t + 0.1 * torch.randn(t.shape, generator=generator)).to(t.dtype)
    tuned = [{name: noise(t) for name, t in base.items()} for _ in range(3)]
    base |= {"ids": torch.arange(3), "tied": base["c.weight"]}
    return base, [model | {"tied": model["c.weight"]} for model in tuned]


@pytest.mark.parametrize("method", SCALED)
def test_an_applied_update_has_the_bits_of_a_merge(method, models):
    base, tuned = models
    for knobs in KNOBS.get(method, [{}]):
        update = prepare(base, tuned, method, **knobs)
        for scale in (0.3, 1.0, -1.7, 0.0):
            merged = merge(base, tuned, method, **{methods()[method].scale: scale}, **knobs)
            applied = apply(base, update, scale)
            assert list(applied) == list(merged)
            assert all(torch.equal(applied[name], merged[name]) for name in merged)
            assert applied["tied"] is applied["c.weight"]


def test_the_published_scales_are_known():
    scales = {name: methods()[name].scale for name in ("tsv_m", "task_arithmetic", "ties_merging", "slerp")}
    assert scales == {
        "tsv_m": "alpha",
        "task_arithmetic": "scaling_factor",
        "ties_merging": "scaling_factor",
        "slerp": None,
    }


def test_an_update_may_lie_in_a_file_and_every_tensor_have_a_scale_of_its_own(models, tmp_path):
    base, tuned = models
    with allocate_checkpoint(update_specs(open_task_vectors(base, tuned)), tmp_path / "update.safetensors") as out:
        prepare(base, tuned, "tsv_m", out=out)
    update = open_checkpoint(tmp_path / "update.safetensors")
    expected = {scale: merge(base, tuned, "tsv_m", alpha=scale) for scale in (0.5, 2.0)}
    mixed = apply(base, update, {name: 0.5 if name == "b" else 2.0 for name in update})
    assert all(torch.equal(mixed[name], expected[0.5 if name == "b" else 2.0][name]) for name in mixed)


def test_what_cannot_be_prepared_or_applied_is_refused(models):
    base, tuned = models
    with pytest.raises(ConfigError, match=r"sce has no factor of its whole update\. Remedy"):
        prepare(base, tuned, "sce")
    with pytest.raises(ConfigError, match=r"method.alpha is what a prepared merge leaves open\. Remedy"):
        prepare(base, tuned, "tsv_m", alpha=1.0)
    update = prepare(base, tuned, "tsv_m")
    for scale in (float("nan"), {"b": 1.0}):
        with pytest.raises(ConfigError, match=r"The scale of 'a.weight' is (nan|None)\. Remedy"):
            apply(base, update, scale)
    if base["b"].dtype != torch.float64:
        with pytest.raises(IncompatibleModels, match="would not be finite at entry"):
            apply(base, update, 1e38 * 100)
