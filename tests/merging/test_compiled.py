"""The compiled loops give the bits of the plain path, and stand aside where they cannot."""

import numpy as np
import pytest
import torch

import suture
from suture import merge, merge_files
from suture.errors import IncompatibleModels
from suture.merging.compiled import loading

pytest.importorskip("numba", reason="the compiled loops need numba: pip install 'suture[fast]'")

CASES = [
    ("ties_merging", {}),
    ("ties_merging", {"merge_func": "mean", "scaling_factor": 1.0}),
    ("ties_merging", {"merge_func": "max", "threshold": 100}),
    ("ties_merging", {"merge_func": "mean", "weights": [0.3, -1.2, 0.0, 2.0], "scope": "tensor"}),
    ("ties_merging", {"weights": [1.0, 0.5, -0.25, 1e-30], "threshold": [5, 20, 80, 100]}),
    ("dare", {}),
    ("dare", {"density": [0.1, 0.5, 1.0, 0.333], "weights": [1.0, -2.0, 0.3, 1e-20], "seed": 7}),
    ("dare", {"rescale": False, "density": 0.7}),
    ("task_arithmetic", {}),
    ("task_arithmetic", {"weights": [0.1, -0.2, 3.0, 0.0], "scaling_factor": 0.77}),
    ("simple_average", {}),
    ("simple_average", {"normalize": False}),
    ("simple_average", {"weights": [0.1, 0.2, 3.0, 0.5]}),
    ("simple_average", {"weights": [1.0, -1.0, 1.0, -1.0]}),
]


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16, "mixed"], ids=str)
def models(request):
    """A base and four fine-tunes with ties, zeros of both signs, subnormal numbers and columns that cancel."""
    generator = torch.Generator().manual_seed(0)
    dtypes = [request.param] * 5 if isinstance(request.param, torch.dtype) else _MIXED
    shapes = {"layers.0.w": (301, 77), "layers.1.w": (4001,), "norm": (1,), "empty": (0, 3), "ids": (3,)}
    base = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    base["layers.1.w"][::7] = 0.0
    base["layers.1.w"][1::7] = -0.0
    base["ids"] = torch.arange(3)
    tuned = [_noisy(base, generator) for _ in range(4)]
    tuned[1]["layers.1.w"][:500] = 2 * base["layers.1.w"][:500] - tuned[0]["layers.1.w"][:500]
    return tuple(_as(state, dtype) for state, dtype in zip([base, *tuned], dtypes, strict=True))


_MIXED = [torch.bfloat16, torch.float32, torch.bfloat16, torch.float16, torch.float32]


def _noisy(base, generator):
    scales = torch.tensor([0.0, 1e-41, 0.01, 0.01, 1.0])
    noisy = {}
    for name, tensor in base.items():
        if tensor.is_floating_point():
            chosen = scales[torch.randint(5, tensor.shape, generator=generator)]
            noisy[name] = tensor + chosen * torch.randn(tensor.shape, generator=generator)
        else:
            noisy[name] = tensor
    return noisy


def _as(state, dtype):
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def _bits(state):
    return {name: tensor.contiguous().view(torch.uint8).tolist() for name, tensor in state.items()}


def both(monkeypatch, function):
    """What a function returns without the compiled loops, and with them."""
    results = []
    for choice in "01":
        monkeypatch.setenv(loading.SWITCH, choice)
        results.append(function())
    return results


@pytest.mark.parametrize(("method", "knobs"), CASES)
def test_a_compiled_loop_changes_no_bit(method, knobs, models, monkeypatch):
    monkeypatch.setattr("suture.merging.task_vectors._CHUNK", 1237)
    base, *tuned = models
    plain, compiled = both(monkeypatch, lambda: merge(base, tuned, method, mixed_dtypes=True, **knobs))
    assert _bits(plain) == _bits(compiled)


@pytest.mark.parametrize("count", [1, 2, 3, 15, 16, 17])
@pytest.mark.parametrize("method", ["ties_merging", "dare", "task_arithmetic", "simple_average"])
def test_any_number_of_models_has_the_same_bits(method, count, monkeypatch):
    generator = torch.Generator().manual_seed(count)
    base = {"w": torch.randn(5003, generator=generator), "v": torch.full((40,), -0.0)}
    tuned = [
        {name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in base.items()} for _ in range(count)
    ]
    tuned[0]["v"] = base["v"].clone()
    plain, compiled = both(monkeypatch, lambda: merge(base, tuned, method))
    assert _bits(plain) == _bits(compiled)


def test_the_loops_are_used(models, monkeypatch):
    monkeypatch.setenv(loading.SWITCH, "1")
    loops, called = loading.compiled_loops(), []
    for name in ("ties", "dare", "linear", "magnitudes"):
        real = getattr(loops, name)
        monkeypatch.setattr(loops, name, lambda *a, name=name, real=real: called.append(name) or real(*a))
    monkeypatch.setattr("suture.merging.order_statistic._SMALLEST_SAMPLE", 100)
    base, *tuned = models
    for method in ("ties_merging", "dare", "task_arithmetic", "simple_average"):
        merge(base, tuned, method, mixed_dtypes=True)
    assert set(called) == {"ties", "dare", "linear", "magnitudes"}


@pytest.mark.parametrize("method", ["ties_merging", "dare", "task_arithmetic", "simple_average"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused_as_before(method, value, models, tmp_path, monkeypatch):
    base, *tuned = models
    tuned[2]["layers.0.w"].view(-1)[1234] = value

    def refusal():
        with pytest.raises(IncompatibleModels) as error:
            merge(base, tuned, method, mixed_dtypes=True)
        return str(error.value)

    plain, compiled = both(monkeypatch, refusal)
    assert plain == compiled
    assert "entry 1234" in plain

    def allowed():
        out = tmp_path / f"{method}{loading.worth_it(0)}"
        merge_files(base, tuned, method, out, allow_non_finite=["layers.0.w"], mixed_dtypes=True)
        return (out / "model.safetensors").read_bytes()

    plain, compiled = both(monkeypatch, allowed)
    assert plain == compiled


def test_the_thresholds_are_those_of_the_plain_search(monkeypatch):
    monkeypatch.setattr("suture.merging.order_statistic._SMALLEST_SAMPLE", 1000)
    monkeypatch.setattr("suture.merging.order_statistic._FEWEST_BINS", 64)
    generator = torch.Generator().manual_seed(1)
    base = {"w": torch.randn(90_001, generator=generator)}
    tuned = [{"w": base["w"] + torch.randn(90_001, generator=generator)} for _ in range(3)]
    vectors = suture.merging.task_vectors.open_task_vectors(base, tuned)
    rows = torch.stack([model["w"] - base["w"] for model in tuned])
    monkeypatch.setenv(loading.SWITCH, "1")
    for rank in (1, 500, 45_000, 89_999, 90_001):
        found = suture.merging.order_statistic.kth_magnitudes(vectors.stream(), rank)
        assert torch.equal(found, rows.abs().kthvalue(rank, dim=1).values)


def test_large_merges_load_the_loops_and_small_ones_do_not(monkeypatch):
    monkeypatch.delenv(loading.SWITCH, raising=False)
    assert loading.worth_it(10**9)
    assert not loading.worth_it(10**6)
    monkeypatch.setenv(loading.SWITCH, "0")
    assert not loading.worth_it(10**9)


def test_without_numba_the_plain_path_merges(monkeypatch, models):
    base, *tuned = models
    expected = merge(base, tuned, "dare", mixed_dtypes=True)
    monkeypatch.setenv(loading.SWITCH, "1")
    monkeypatch.setattr("suture.merging.task_vectors.compiled_loops", lambda: None)
    assert _bits(merge(base, tuned, "dare", mixed_dtypes=True)) == _bits(expected)
    assert np.isfinite(expected["norm"].float().numpy()).all()
