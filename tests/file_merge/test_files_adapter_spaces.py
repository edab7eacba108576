"""Adapters into one adapter by any method: the reference vectors of Core Space, KnOTS and DC-Merge, and their laws."""

import json

import pytest
import second_family
import torch
from safetensors.torch import save_file

from suture import merge_files
from suture.checkpoints import open_checkpoint
from suture.errors import ConfigError, IncompatibleModels
from suture.file_merge.adapter_spaces import SPACES
from suture.merging.registry import get_method

_INNER = {
    "sum": ("task_arithmetic", {"scaling_factor": 1.0}),
    "mean": ("simple_average", {}),
    "linear": ("task_arithmetic", {}),
    "tsv_m": ("tsv_m", {}),
    "iso_c": ("iso_c", {}),
    "cart": ("cart", {}),
}


def save_adapter(folder, pairs, dtype=torch.float64):
    """A folder as peft saves it; `pairs` are module → (B, A), with a factor of 1."""
    folder.mkdir(parents=True)
    tensors = {}
    for module, (up, down) in pairs.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = down.to(dtype).contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = up.to(dtype).contiguous()
    ranks = {module: down.shape[0] for module, (_, down) in pairs.items()}
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "rank_pattern": ranks, "alpha_pattern": ranks}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def products(folder):
    """Module → B·A of a folder whose factors have the scale 1."""
    file = open_checkpoint(folder / "adapter_model.safetensors")
    modules = {name.split(".lora_")[0] for name in file}
    return {
        m.removeprefix("base_model.model."): file[f"{m}.lora_B.weight"].double() @ file[f"{m}.lora_A.weight"].double()
        for m in modules
    }


def reference_adapters(case, folder, dtype=torch.float64):
    if case == "core_uneven":
        t = second_family.tensors(case)
        tasks = [{"q": (t[f"B_{i}"], t[f"A_{i}"])} for i in range(3)]
    else:
        t = second_family.tensors("lora")
        tasks = [{m: (t[f"{m}/B"][i], t[f"{m}/A"][i]) for m in ("q", "v")} for i in range(3)]
    return {f"t{i}": save_adapter(folder / f"t{i}", pairs, dtype) for i, pairs in enumerate(tasks)}


def reference_call(case):
    """Space, method and knobs of a case."""
    knobs, method = second_family.INDEX[case]["knobs"], second_family.INDEX[case]["method"]
    space = {"core_space": "core", "knots": "knots"}.get(method) or (
        "dc_linear" if knobs["smooth"] == "linear" else "dc"
    )
    if knobs["inner"] != "ties":
        name, options = _INNER[knobs["inner"]]
        options = options | ({"scaling_factor": knobs["scale"]} if "scale" in knobs else {})
        return space, name, options | ({"rank_ratio": knobs["rank"]} if "rank" in knobs else {})
    scope = "model" if knobs.get("scope") == "all layers" else "tensor"
    keep = 4 / 36 if method == "core_space" else knobs["keep"]  # its authors keep one entry more than 10 % of 6 × 6
    options = {"threshold": keep, "scope": scope, "merge_func": "mean"}
    return space, "ties_merging", options | {"scaling_factor": knobs.get("scale", 1.0)}


@pytest.mark.parametrize("case", second_family.names("lora", "core_space", "knots", "dc_merge"))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_the_reference_vectors_are_matched(case, dtype, tolerance, tmp_path):
    space, method, knobs = reference_call(case)
    adapters = reference_adapters(case, tmp_path, dtype)
    found = products(merge_files(None, adapters, method, tmp_path / "out", space=space, **knobs))
    wanted = second_family.part(case, "delta") or {"q": second_family.tensors(case)["delta"]}
    assert set(found) == set(wanted)
    for module, delta in wanted.items():
        difference = (found[module] - delta).abs().max() / delta.abs().max()
        assert difference < tolerance, (module, float(difference))


@pytest.fixture
def adapters(tmp_path):
    torch.manual_seed(0)
    shapes = {"a.q_proj": (7, 5), "lm_head": (6, 7)}
    return {
        f"t{i}": save_adapter(
            tmp_path / f"t{i}", {m: (torch.randn(o, 2 + i), torch.randn(2 + i, n)) for m, (o, n) in shapes.items()}
        )
        for i in range(2)
    }


@pytest.mark.parametrize("space", ["core", "knots"])
@pytest.mark.parametrize("method", ["task_arithmetic", "simple_average"])
def test_a_linear_method_gives_the_same_in_every_lossless_space(adapters, space, method, tmp_path):
    plain = products(merge_files(None, adapters, method, tmp_path / "plain"))
    found = products(merge_files(None, adapters, method, tmp_path / "out", space=space))
    for module, delta in plain.items():
        torch.testing.assert_close(found[module], delta, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("method", ["ties_merging", "tsv_m", "iso_c", "dare", "magmax", "wudi"])
def test_any_method_merges_in_any_space_whatever_the_order_of_a_zero_adapter(adapters, space, method, tmp_path):
    zero = {"a.q_proj": (torch.zeros(7, 2), torch.randn(2, 5))}
    every = {**adapters, "zero": save_adapter(tmp_path / "zero", zero)}
    out = merge_files(None, every, method, tmp_path / "out", space=space)
    assert all(delta.isfinite().all() and delta.any() for delta in products(out).values())
    assert get_method(method).name == json.loads((out / "suture_merge.json").read_text())["adapter"]["method"]


def test_the_report_says_what_a_lower_rank_costs(adapters, tmp_path):
    whole = products(merge_files(None, adapters, "task_arithmetic", tmp_path / "whole"))
    out = merge_files(None, adapters, "task_arithmetic", tmp_path / "out", rank=2)
    cut = products(out)
    norm = lambda tensors: sum(float(t.square().sum()) for t in tensors) ** 0.5
    lost = norm(whole[m] - cut[m] for m in whole) / norm(whole.values())
    (line,) = json.loads((out / "suture_merge.json").read_text())["adapter"]["report"]
    assert line.startswith(f"cut to rank 2: {lost:.3g} of the norm of the merged task vector is lost")
    assert json.loads((tmp_path / "whole" / "suture_merge.json").read_text())["adapter"]["report"] == []


def test_the_result_in_a_space_loads_in_peft(adapters, tmp_path):
    from peft import PeftModel

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.lm_head = torch.nn.Module(), torch.nn.Linear(7, 6, dtype=torch.float64)
            self.a.q_proj = torch.nn.Linear(5, 7, dtype=torch.float64)

    out = merge_files(None, adapters, "tsv_m", tmp_path / "out", space="core", rank=3)
    net = Net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    after = PeftModel.from_pretrained(net, str(out), autocast_adapter_dtype=False).merge_and_unload().state_dict()
    for module, delta in products(out).items():
        torch.testing.assert_close(after[f"{module}.weight"] - before[f"{module}.weight"], delta)


def test_a_space_or_an_adapter_that_cannot_be_is_refused(adapters, tmp_path):
    with pytest.raises(ConfigError, match=r"Unknown space 'kore'\. Did you mean 'core'"):
        merge_files(None, adapters, "tsv_m", tmp_path / "out", space="kore")
    with pytest.raises(ConfigError, match="space=core is for merging adapters"):
        merge_files({"w": torch.zeros(2)}, adapters, "tsv_m", tmp_path / "out", space="core")
    config = json.loads((adapters["t0"] / "adapter_config.json").read_text())
    (adapters["t0"] / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "pissa"}))
    with pytest.raises(IncompatibleModels, match="init_lora_weights=pissa, which needs its base"):
        merge_files(None, adapters, "task_arithmetic", tmp_path / "out")
