"""LoRA adapters as inputs of a merge of files, and adapters merged into one adapter."""

import json

import pytest
import tiny_llama
import torch
from safetensors.torch import save_file

import suture
from suture import merge_files
from suture.checkpoints import open_checkpoint, open_fine_tuned
from suture.cli.main import main
from suture.errors import ConfigError, IncompatibleModels, OutputError


def save_adapter(folder, seed, rank=2, alpha=4, modules=("first", "last"), **config):
    """A folder as peft saves it, for modules of 6 rows and 5 columns."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in modules:
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, 5, generator=generator)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(6, rank, generator=generator)
    told = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": list(modules), **config}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def base():
    generator = torch.Generator().manual_seed(9)
    return {f"{m}.weight": torch.randn(6, 5, generator=generator) for m in ("first", "last", "other")}


@pytest.fixture
def adapters(tmp_path):
    return {
        "one": save_adapter(tmp_path / "one", 1),
        "two": save_adapter(tmp_path / "two", 2, rank=3, alpha=3, modules=("first",), use_rslora=True),
    }


def deltas(base, folder):
    """What an adapter adds to the base."""
    tuned = open_fine_tuned(folder, open_checkpoint(base))
    return {name: tuned[name] - base[name] for name in base}


@pytest.mark.parametrize("method", ["task_arithmetic", "ties_merging", "dare"])
@pytest.mark.parametrize("chunk", [7, 1 << 17])
def test_adapters_are_merged_into_files_slice_by_slice(base, adapters, tmp_path, monkeypatch, method, chunk):
    expected = suture.merge(base, adapters, method)
    monkeypatch.setattr("suture.merging.task_vectors._CHUNK", chunk)
    found = tiny_llama.tensors(merge_files(base, adapters, method, tmp_path / "out"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_sum_of_an_adapter_and_a_bf16_base_is_rounded_once(adapters, tmp_path):
    base = {f"{m}.weight": torch.randn(6, 5).bfloat16() for m in ("first", "last")}
    low = {k: t.float() for k, t in base.items()}
    out = merge_files(base, {"one": adapters["one"]}, "task_arithmetic", tmp_path / "out", scaling_factor=0.01)
    for name, tensor in tiny_llama.tensors(out).items():
        assert torch.equal(tensor, (low[name] + 0.01 * (deltas(low, adapters["one"])[name])).bfloat16())


@pytest.mark.parametrize(
    ("method", "knobs", "factors"),
    [
        ("task_arithmetic", {"scaling_factor": 0.5}, (0.5, 0.5)),
        ("task_arithmetic", {"scaling_factor": 0.5, "weights": [1.0, 3.0]}, (0.5, 1.5)),
        ("simple_average", {}, (0.5, 0.5)),
        ("simple_average", {"weights": [1.0, 3.0]}, (0.25, 0.75)),
    ],
)
def test_one_adapter_holds_the_sum_exactly(base, adapters, tmp_path, method, knobs, factors):
    out = merge_files(None, adapters, method, tmp_path / "out", **knobs)
    found = deltas(base, out)
    one, two = (deltas(base, folder) for folder in adapters.values())
    for name in base:
        torch.testing.assert_close(found[name], factors[0] * one[name] + factors[1] * two[name])
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 5
    assert set(json.loads((out / "suture_merge.json").read_text())["inputs"]) == {"one", "two"}


def test_a_lower_rank_is_the_best_there_is(base, adapters, tmp_path):
    out = merge_files(None, adapters, "task_arithmetic", tmp_path / "out", scaling_factor=1.0, rank=2)
    found = deltas(base, out)
    one, two = (deltas(base, folder) for folder in adapters.values())
    for name in ("first.weight", "last.weight"):
        left, values, right = torch.linalg.svd(one[name] + two[name])
        best = left[:, :2] * values[:2] @ right[:2]
        torch.testing.assert_close(found[name], best, rtol=0, atol=1e-4)


def test_peft_loads_the_merged_adapter(tmp_path):
    from peft import PeftModel

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = torch.nn.Linear(5, 6), torch.nn.Linear(5, 6)

    net = Net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    folders = {str(i): save_adapter(tmp_path / str(i), i, modules=("first", "last")[: i + 1]) for i in (0, 1)}
    out = merge_files(None, folders, "task_arithmetic", tmp_path / "out", scaling_factor=0.7)
    wanted = suture.merge(net, folders, "task_arithmetic", scaling_factor=0.7)
    merged = PeftModel.from_pretrained(net, str(out)).merge_and_unload().state_dict()
    for name in before:
        torch.testing.assert_close(merged[name], wanted[name])


def test_what_cannot_be_one_adapter_is_refused(base, adapters, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="ties_merging cannot merge adapters into one adapter"):
        merge_files(None, adapters, "ties_merging", out)
    with pytest.raises(ConfigError, match="rank=2 is for merging adapters"):
        merge_files(base, adapters, "task_arithmetic", out, rank=2)
    with pytest.raises(ConfigError, match="wanted one per model, 2"):
        merge_files(None, adapters, "task_arithmetic", out, weights=[1.0])
    turned = {**adapters, "turned": save_adapter(tmp_path / "turned", 3, fan_in_fan_out=True)}
    with pytest.raises(IncompatibleModels, match="fan_in_fan_out differs"):
        merge_files(None, turned, "task_arithmetic", out)
    whole = save_adapter(tmp_path / "whole", 4)
    tensors = dict(open_checkpoint(whole / "adapter_model.safetensors")) | {
        "base_model.model.norm.weight": torch.ones(2)
    }
    save_file({k: t.clone() for k, t in tensors.items()}, whole / "adapter_model.safetensors")
    with pytest.raises(IncompatibleModels, match="is no factor of a low rank"):
        merge_files(None, {**adapters, "whole": whole}, "task_arithmetic", out)
    assert not out.exists()
    merge_files(None, adapters, "task_arithmetic", out)
    with pytest.raises(OutputError, match="already exists"):
        merge_files(None, adapters, "task_arithmetic", out)


def stated(folder, base):
    """An adapter whose configuration names its base."""
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
    return folder


@pytest.mark.parametrize(
    ("known", "named", "told"),
    [
        ("org/llama-8b", "org/llama-8b", False),
        ("org/llama-8b", "Mirror/Llama-8B", False),  # a copy of the same name
        ("org/llama-8b", "org/llama-8b-instruct", True),
        (None, "org/llama-8b-instruct", False),  # nobody knows what the folder holds
        ("org/llama-8b", "/home/somebody/llama", False),
    ],
)
def test_an_adapter_that_was_trained_on_another_base_is_told(known, named, told, base, adapters, tmp_path, capsys):
    folder = tmp_path / "base"
    folder.mkdir()
    save_file(base, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "_name_or_path": known}))
    one = stated(adapters["one"], named)
    words = [f"base={folder}", f"models.one={one}", "method=simple_average", f"output={tmp_path / 'out'}"]
    assert main(["merge", *words]) == 0
    note = f"note: 'one' was trained on '{named}', by its adapter_config.json; the base is '{known}'."
    assert (note in capsys.readouterr().out) == told


def test_an_adapter_whose_base_is_another_folder_is_told(base, adapters, tmp_path, capsys):
    for name in ("base", "other"):
        (tmp_path / name).mkdir()
        save_file(base, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "own"}))
    one, two = stated(adapters["one"], str(tmp_path / "other")), stated(adapters["two"], str(tmp_path / "base"))
    words = [f"models.one={one}", f"models.two={two}", f"output={tmp_path / 'out'}"]
    assert main(["merge", f"base={tmp_path / 'base'}", "method=simple_average", *words]) == 0
    printed = capsys.readouterr().out
    assert f"note: 'one' was trained on '{tmp_path / 'other'}'" in printed
    assert "'two' was trained on" not in printed


def test_adapters_of_different_bases_that_become_one_are_told(adapters, tmp_path, capsys):
    one, two = stated(adapters["one"], "org/llama"), stated(adapters["two"], "org/llama-instruct")
    words = [f"models.one={one}", f"models.two={two}", f"output={tmp_path / 'out'}"]
    assert main(["merge", "method=simple_average", *words]) == 0
    assert "note: 'two' was trained on 'org/llama-instruct' and 'one' on 'org/llama'" in capsys.readouterr().out
