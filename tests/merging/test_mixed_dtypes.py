"""TIES over models whose tensors have several dtypes: a magnitude counts as the number that it is."""

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import suture
from suture.adaptation import AdaMergingOptions
from suture.adaptation.vectors import task_vector_rows
from suture.merging.methods.ties_merging import trim_thresholds
from suture.merging.task_vectors import compute_dtype, open_task_vectors

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LARGE = 150_000  # three of them are more than what a sample takes whole


def textbook(base, models, percentage):
    """The threshold and the trimmed task vectors of each model, flattened, sorted and compared in float64."""
    names, trimmed = sorted(base), []
    for model in models:
        computed = {name: compute_dtype(base[name].dtype) for name in names}
        deltas = {n: (model[n].to(computed[n]) - base[n].to(computed[n])).double().flatten() for n in names}
        flat = torch.cat([deltas[name] for name in names])
        rank = len(flat) - int(len(flat) * percentage / 100)
        threshold = flat.abs().kthvalue(rank).values if rank else torch.tensor(0.0)
        trimmed.append((threshold, {n: torch.where(d.abs() >= threshold, d, 0.0) for n, d in deltas.items()}))
    return trimmed


def model(generator, sizes, dtypes):
    """Tenths, which every dtype rounds to another number; their magnitudes are the same up to that."""
    draw = lambda size: torch.randint(-30, 31, (size,), generator=generator).double() / 10
    return {f"t{i}": draw(size).to(dtype) for i, (size, dtype) in enumerate(zip(sizes, dtypes, strict=True))}


def check(base, models, percentage):
    """The thresholds of all models, and what each keeps of its task vector."""
    expected = textbook(base, models, percentage)
    statistic = trim_thresholds(open_task_vectors(base, models).stream(), threshold=percentage)
    assert statistic.thresholds.tolist() == [threshold.item() for threshold, _ in expected]
    for tuned, (_, trimmed) in zip(models, expected, strict=True):
        merged = suture.merge(base, [tuned], "ties_merging", threshold=percentage, scaling_factor=1.0)
        for name, tensor in merged.items():
            deltas = trimmed[name].to(compute_dtype(tensor.dtype))
            assert torch.equal(tensor, (base[name].to(deltas.dtype) + deltas).to(tensor.dtype))


@pytest.mark.parametrize("dtypes", list(permutations([torch.float32, torch.float32, torch.float64, torch.bfloat16], 3)))
@pytest.mark.parametrize("percentage", [5, 50])
def test_large_tensors_of_every_order_of_dtypes(dtypes, percentage, generator):
    sizes = (LARGE, LARGE + 1, LARGE + 2)
    base = {name: torch.zeros_like(tensor) for name, tensor in model(generator, sizes, dtypes).items()}
    check(base, [model(generator, sizes, dtypes)], percentage)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.sampled_from(DTYPES)), min_size=1, max_size=5),
    st.floats(1.5, 100),
    st.integers(0, 2**31),
)
def test_small_tensors_of_any_sizes_and_dtypes(tensors, percentage, seed):
    generator = torch.Generator().manual_seed(seed)
    sizes, dtypes = zip(*tensors, strict=True)
    base = model(generator, sizes, dtypes)
    check(base, [model(generator, sizes, dtypes)], percentage)


@pytest.mark.parametrize("sizes", [(2, LARGE, 2 * LARGE, 1), (2 * LARGE, 3, 1, LARGE)])
def test_several_models_and_sizes_far_apart(sizes, generator):
    dtypes = (torch.float32, torch.float64, torch.float32, torch.float32)
    base = model(generator, sizes, dtypes)
    check(base, [model(generator, sizes, dtypes) for _ in range(3)], 20)


def test_a_double_just_below_a_single_of_the_same_digits():
    base = {"a": torch.zeros(1), "b": torch.zeros(2, dtype=torch.float64), "c": torch.zeros(1)}
    tuned = {"a": torch.tensor([3.0]), "b": torch.tensor([0.1, 0.05], dtype=torch.float64), "c": torch.tensor([2.0])}
    # the authors keep |τ| ≥ the 2nd smallest of four, 0.1 in float64, which is less than 0.1 in float32
    merged = suture.merge(base, [tuned], "ties_merging", threshold=50, scaling_factor=1.0)
    assert merged["b"].tolist() == [0.1, 0.0]
    assert (merged["a"].item(), merged["c"].item()) == (3.0, 2.0)


@pytest.mark.parametrize("large", [1e300, 1e-300])
def test_a_threshold_beyond_float32(large):
    base = {"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.float64)}
    tuned = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([large, 3 * large], dtype=torch.float64)}
    check(base, [tuned], 25)
    check(base, [tuned], 50)


def test_files_and_the_rows_of_adamerging_pp_agree_with_the_textbook(tmp_path, generator):
    sizes, dtypes = (LARGE, LARGE, LARGE), (torch.float32, torch.float64, torch.float32)
    base, models = model(generator, sizes, dtypes), {n: model(generator, sizes, dtypes) for n in ("one", "two")}
    for name, tensors in {"base": base, **models}.items():
        suture.save_checkpoint(tensors, tmp_path / f"{name}.safetensors")
    files = {name: tmp_path / f"{name}.safetensors" for name in models}
    knobs = {"threshold": 20, "scaling_factor": 1.0}
    output = tmp_path / "merged"
    suture.merge_files(tmp_path / "base.safetensors", files, "ties_merging", output=output, **knobs)
    expected = textbook(base, list(models.values()), 20)
    in_memory = suture.merge(base, models, "ties_merging", **knobs)
    rows = task_vector_rows(open_task_vectors(base, models), AdaMergingOptions(plus_plus=True))
    for name, tensor in suture.open_checkpoint(output).items():
        assert torch.equal(tensor, in_memory[name])
        trimmed = torch.stack([deltas[name] for _, deltas in expected]).to(tensor.dtype)
        side = trimmed.sum(0).sign()
        decided = side != 0
        agreeing = trimmed * (trimmed * side > 0)
        assert torch.equal(rows[name].values[:, decided], agreeing[:, decided])
        torch.testing.assert_close(tensor[decided], (base[name] + agreeing.sum(0))[decided])
