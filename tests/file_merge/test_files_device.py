"""Merging slices on a device: everything of them is there, and the result has the bits of the CPU's."""

import far_tensors
import pytest
import torch

from suture import merge, merge_files, save_checkpoint
from suture.cli.main import main
from suture.errors import ConfigError, OutputError
from suture.merging.registry import methods

pytestmark = pytest.mark.device
KNOBS = {
    "sce": [{"select_topk": 0.3}],
    "della": [{"rescale": "l1", "epsilon": [0.1, 0.2]}, {"density": [0.3, 0.6], "merge_func": "max"}],
    "dare_ties": [{"rescale": "l1"}, {"density": [0.3, 1.0], "weights": [0.5, 1.0], "merge_func": "mean"}],
    "ties_merging": [{"scope": "tensor", "merge_func": "mean", "weights": [0.5, 1.0]}, {}],
    "nuslerp": [{"origin": "base"}],
    "simple_average": [{"weights": [0.5, 1.0]}],
}


@pytest.fixture
def models():
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.w": torch.randn(30, 20, generator=generator).bfloat16() for i in range(3)}
    base |= {"norm": torch.ones(7), "ids": torch.arange(4)}
    noisy = lambda t: t + (0.1 * torch.randn(t.shape, generator=generator)).to(t.dtype) if t.is_floating_point() else t
    return base, [{name: noisy(t) for name, t in base.items()} for _ in range(2)]


@pytest.mark.parametrize("method", sorted(methods()))
def test_a_method_leaves_nothing_of_a_slice_behind_and_changes_no_bit(method, models, tmp_path, monkeypatch):
    base, tuned = models
    tuned = tuned[: int(min(2, methods()[method].num_models[1]))]
    for i, knobs in enumerate(KNOBS.get(method, [{}])):
        near = merge_files(base, tuned, method, tmp_path / f"near{i}", **knobs)
        with monkeypatch.context() as patch:
            far_tensors.reach(patch)
            before = far_tensors.Far.operations
            far = merge_files(base, tuned, method, tmp_path / f"far{i}", device="cuda", **knobs)
            assert far_tensors.REAL or far_tensors.Far.operations > before + len(base)
        assert (far / "model.safetensors").read_bytes() == (near / "model.safetensors").read_bytes()


@pytest.mark.skipif(far_tensors.REAL, reason="there is a GPU")
def test_the_stand_in_refuses_to_be_mixed(monkeypatch):
    far_tensors.reach(monkeypatch)
    far = torch.ones(3).to("cuda")
    assert (far + torch.tensor(1.0)).cpu().tolist() == [2, 2, 2]
    with pytest.raises(RuntimeError, match="found a CPU tensor"):
        far + torch.ones(3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_order_statistics_are_searched_for_on_the_device(dtype, monkeypatch, tmp_path):
    monkeypatch.setattr("suture.merging.order_statistic._SMALLEST_SAMPLE", 500)
    monkeypatch.setattr("suture.merging.order_statistic._FEWEST_BINS", 32)
    monkeypatch.setattr("suture.merging.task_vectors._DEVICE_CHUNK", 4096)
    generator = torch.Generator().manual_seed(0)
    base = {f"{i}.w": torch.randn(60, 301, generator=generator).to(dtype) for i in range(3)}
    tuned = [{n: w + torch.randn(w.shape, generator=generator).to(dtype) for n, w in base.items()} for _ in range(3)]
    for knobs in ({}, {"threshold": [1.0, 50, 99]}, {"scope": "tensor", "merge_func": "mean"}):
        near = merge(base, tuned, "ties_merging", **knobs)
        with monkeypatch.context() as patch:
            far_tensors.reach(patch)
            far = merge(base, tuned, "ties_merging", device="cuda", **knobs)
        assert all(torch.equal(far[name], tensor) for name, tensor in near.items())


@pytest.mark.parametrize("after", [None, ["svc"], ["lines"]])
def test_a_merge_in_memory_has_the_same_bits(after, models, monkeypatch):
    base, tuned = models
    near = merge(base, tuned, "dare", after=after)
    far_tensors.reach(monkeypatch)
    far = merge(base, tuned, "dare", after=after, device="cuda")
    assert all(far[name].device.type == "cpu" and torch.equal(far[name], tensor) for name, tensor in near.items())


def test_the_command_line_merges_on_the_device(models, tmp_path, monkeypatch):
    base, tuned = models
    for name, state in (("base", base), ("one", tuned[0]), ("two", tuned[1])):
        save_checkpoint(state, tmp_path / f"{name}.safetensors")
    paths = [f"base={tmp_path}/base.safetensors", *(f"models.{n}={tmp_path}/{n}.safetensors" for n in ("one", "two"))]
    assert main(["merge", *paths, "method=ties_merging", f"output={tmp_path}/near"]) == 0
    far_tensors.reach(monkeypatch)
    assert main(["merge", *paths, "method=ties_merging", f"output={tmp_path}/far", "--device", "cuda"]) == 0
    near, far = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("near", "far"))
    assert near == far


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda", "finds 0 CUDA devices. Remedy: device=cpu"),
        ("cuda:1", "finds 0 CUDA devices"),
        ("cpu:1", "wanted cpu, cuda or cuda:N"),
        ("gpu", "wanted cpu, cuda or cuda:N"),
    ],
)
def test_a_device_that_is_not_there_is_refused_in_one_line(device, message, models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=message):
        merge_files(*models, "dare", tmp_path / "out", device=device)
    words = ["base=none", "models.a=none", "method=dare", f"output={tmp_path}/out"]
    assert main(["merge", *words, "--device", device]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_merge_goes_on_on_the_device_where_it_began(models, tmp_path, monkeypatch):
    merge_files(*models, "dare", tmp_path / "out", shard="1/2")
    far_tensors.reach(monkeypatch)
    with pytest.raises(OutputError, match="device differ"):
        merge_files(*models, "dare", tmp_path / "out", shard="2/2", device="cuda")
