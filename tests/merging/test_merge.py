"""Merging whole models: parity, streaming, buffers, ties, bad weights, memory."""

import subprocess
import sys

import golden_cases as golden
import pytest
import torch

from suture import get_method, merge, merge_files, methods
from suture.checkpoints import allocate_checkpoint, open_checkpoint, save_checkpoint
from suture.errors import IncompatibleModels
from suture.merging.task_vectors import open_task_vectors

CASES = [
    *golden.names("ties_global"),
    *(name for name in golden.names("tensor_") if name != "tensor_linear"),  # an average of all, not beside a base
]


def knobs_of(case):
    if case["scope"] == "model":
        return "ties_merging", {key: case[key] for key in ("threshold", "merge_func", "scaling_factor")}
    parameters = case["parameters"]
    if case["method"] == "task_arithmetic":
        return "task_arithmetic", {"scaling_factor": parameters["weight"]}
    if case["method"] == "breadcrumbs":
        kept = {key: parameters[key] for key in ("density", "gamma")}
        return "breadcrumbs", {"scaling_factor": parameters["weight"], **kept}
    if case["method"] != "ties":
        return case["method"], {key: value for key, value in parameters.items() if key != "filter_wise"}
    merge_func = "mean" if parameters["normalize"] else "sum"
    shared = {"scope": "tensor", "threshold": parameters["density"], "merge_func": merge_func, "scaling_factor": 1.0}
    return "ties_merging", shared


@pytest.mark.parametrize("name", CASES)
def test_a_whole_model_equals_the_published_implementation(name):
    case, base, models, tensors = golden.load(name)
    method, knobs = knobs_of(case)
    merged = merge(base, models, method, **knobs)
    for key in base:
        torch.testing.assert_close(merged[key], tensors[f"merged/{key}"], rtol=0, atol=1e-6)


def test_the_weight_average_equals_mergekit():
    _, _, models, tensors = golden.load("tensor_linear")
    merged = merge(next(iter(models.values())), models, "simple_average")
    for key in merged:
        torch.testing.assert_close(merged[key], tensors[f"merged/{key}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", sorted(methods()))
def test_slices_and_threads_do_not_change_a_bit(method, generator, monkeypatch):
    base, models = random_models(generator, sizes=((400, 500), 300), count=fitting(method))
    knobs = {"select_topk": 0.3} if method == "sce" else {}
    whole = merge(base, models, method, **knobs)
    monkeypatch.setattr("suture.merging.task_vectors._CHUNK", 999)
    for threads in (1, 3):
        sliced = merge(base, models, method, threads=threads, **knobs)
        assert all(torch.equal(whole[name], sliced[name]) for name in whole)


@pytest.mark.parametrize("method", sorted(methods()))
def test_empty_tensors_and_scalars_are_no_trouble(method, generator):
    base, models = random_models(generator, sizes=((0, 3), (), (4, 3)), count=fitting(method))
    merged = merge(base, models, method)
    assert [tuple(merged[name].shape) for name in base] == [(0, 3), (), (4, 3)]
    assert all(tensor.isfinite().all() for tensor in merged.values())


@pytest.mark.parametrize("majority", [1, -1])
def test_cancelled_columns_follow_the_majority_across_tensors(majority):
    base = {"a": torch.zeros(2), "b": torch.zeros(3)}
    votes = majority * torch.ones(3)
    one, two = {"a": torch.tensor([2.0, 0]), "b": votes}, {"a": torch.tensor([-2.0, 0]), "b": votes}
    merged = merge(base, [one, two], "ties_merging", threshold=100, scaling_factor=1.0)
    assert merged["a"].tolist() == [2.0 * majority, 0.0]


def test_arithmetic_is_float32_and_the_dtype_is_the_base_s(generator):
    base = {"w": torch.randn(1000, generator=generator).bfloat16()}
    models = [{"w": (base["w"].float() + 0.1 * torch.randn(1000, generator=generator)).bfloat16()} for _ in range(3)]
    merged = merge(base, models, "task_arithmetic")["w"]
    exact = base["w"].float() + 0.3 * sum(model["w"].float() - base["w"].float() for model in models)
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, exact.bfloat16())


def test_integer_buffers_come_from_the_base_and_scalars_stay_scalars():
    base = {"w": torch.tensor(1.0), "num_batches_tracked": torch.tensor(7)}
    merged = merge(base, [{"w": torch.tensor(2.0), "num_batches_tracked": torch.tensor(900)}], "simple_average")
    assert merged["w"].shape == ()
    assert merged["w"].item() == 2
    assert merged["num_batches_tracked"].item() == 7


def test_batch_norm_statistics_are_merged_like_weights():
    def network(mean):
        norm = torch.nn.BatchNorm1d(2)
        norm.running_mean.fill_(mean)
        return norm

    merged = merge(network(0.0), [network(1.0), network(3.0)], "simple_average")
    assert merged["running_mean"].tolist() == [2.0, 2.0]
    assert merged["num_batches_tracked"].item() == 0


def test_tied_weights_stay_tied():
    def network(value):
        weight = torch.full((3, 2), value)
        return {"embed.weight": weight, "head.weight": weight}

    merged = merge(network(0.0), [network(1.0)], "task_arithmetic", scaling_factor=1.0)
    assert merged["embed.weight"] is merged["head.weight"]
    assert merged["head.weight"].unique().item() == 1.0


def test_removed_keys_stay_at_the_base():
    base, tuned = {"a": torch.zeros(2), "b": torch.zeros(2)}, {"a": torch.ones(2), "b": torch.ones(2)}
    merged = merge(base, [tuned], "ties_merging", scaling_factor=1.0, threshold=100, remove_keys=["b"])
    assert merged["a"].tolist() == [1, 1]
    assert merged["b"].tolist() == [0, 0]


def test_modules_are_merged_and_left_as_they_are(generator):
    torch.manual_seed(0)
    modules = [torch.nn.Linear(4, 3) for _ in range(3)]
    before = [{name: tensor.clone() for name, tensor in module.state_dict().items()} for module in modules]
    merged = merge(modules[0], modules[1:], "simple_average")
    torch.testing.assert_close(merged["weight"], (modules[1].weight + modules[2].weight).detach() / 2)
    for module, state in zip(modules, before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", sorted(methods()))
def test_a_single_bad_entry_is_found_and_named(method, bad, generator):
    base, models = random_models(generator, sizes=(100_000,), count=fitting(method))
    last = list(models)[-1]
    models[last]["t0"][77_777] = bad
    with pytest.raises(IncompatibleModels, match=rf"'t0' is not finite at entry 77777 in '{last}'"):
        merge(base, models, method)


@pytest.mark.parametrize("method", ["simple_average", "task_arithmetic", "ties_merging", "dare"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_result_that_is_too_large_for_its_dtype_is_refused_in_memory_and_in_files(method, dtype, tmp_path):
    largest = torch.finfo(dtype).max
    base, tuned = {"w": torch.zeros(3, dtype=dtype)}, {"w": torch.tensor([0, largest, largest], dtype=dtype)}
    knobs = {"normalize": False} if method == "simple_average" else {"scaling_factor": 1.0}
    models = {"one": tuned, "two": tuned, "three": tuned}
    knobs |= {"density": 0.9} if method == "dare" else {}
    message = rf"'w' would not be finite at entry \d as {str(dtype)[6:]}\. Remedy: .*smaller coefficients"
    with pytest.raises(IncompatibleModels, match=message):
        merge(base, models, method, **knobs)
    with pytest.raises(IncompatibleModels, match=message):
        merge_files(base, models, method, tmp_path / "merged", **knobs)


def test_the_result_may_be_written_straight_into_a_file(tmp_path, generator):
    base, models = random_models(generator, sizes=(5000, 7))
    vectors = open_task_vectors(base, models)
    with allocate_checkpoint(vectors.specs, tmp_path / "merged.safetensors") as out:
        merge(base, models, "ties_merging", out=out)
    expected = merge(base, models, "ties_merging")
    written = open_checkpoint(tmp_path / "merged.safetensors")
    assert all(torch.equal(written[name], expected[name]) for name in expected)


def test_merging_files_takes_little_memory_of_its_own(tmp_path, generator):
    base, models = random_models(generator, sizes=(10_000_000, 10_000_000))
    save_checkpoint(base, tmp_path / "base.safetensors")
    for name, model in models.items():
        save_checkpoint(model, tmp_path / f"{name}.safetensors")
    program = """
import sys, threading, time
from pathlib import Path
from suture import merge
from suture.checkpoints import allocate_checkpoint, open_checkpoint
folder = Path(sys.argv[1])
def anonymous():
    line = next(l for l in open("/proc/self/status") if l.startswith("RssAnon"))
    return int(line.split()[1]) * 1024
base = open_checkpoint(folder / "base.safetensors")
before, peak, done = anonymous(), [0], []
def watch():
    while not done:
        peak[0] = max(peak[0], anonymous() - before)
        time.sleep(0.002)
watcher = threading.Thread(target=watch, daemon=True); watcher.start()
with allocate_checkpoint(base.specs, folder / "out.safetensors") as out:
    merge(base, sorted(folder.glob("model_*")), "ties_merging", out=out)
done.append(1); watcher.join()
print(peak[0])
"""
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
    model_size = 80_000_000
    assert int(done.stdout) < 1.5 * model_size


def fitting(method):
    """How many models to merge: 3, or as many as the method takes."""
    return int(min(3, get_method(method).num_models[1]))


def random_models(generator, sizes, count=3):
    base = {f"t{i}": torch.randn(size, generator=generator) for i, size in enumerate(sizes)}
    tuned = lambda: {n: w + 0.1 * torch.randn(w.shape, generator=generator) for n, w in base.items()}
    return base, {f"model_{i}": tuned() for i in range(count)}
