"""Merging slices on a device: everything of them is there, and the result has the bits of the CPU's."""

import far_tensors
import pytest
import torch

from suture import merge_files
from suture.cli.main import main
from suture.errors import ConfigError, OutputError
from suture.merging.registry import methods

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
            assert far_tensors.Far.operations > before + len(base)
        assert (far / "model.safetensors").read_bytes() == (near / "model.safetensors").read_bytes()


def test_the_stand_in_refuses_to_be_mixed(monkeypatch):
    far_tensors.reach(monkeypatch)
    far = torch.ones(3).to("cuda")
    assert (far + torch.tensor(1.0)).cpu().tolist() == [2, 2, 2]
    with pytest.raises(RuntimeError, match="found a CPU tensor"):
        far + torch.ones(3)


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
