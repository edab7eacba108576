"""Low-precision weights: decoded as the libraries that own the formats decode them, slice by slice; and merged."""

import json

import pytest
import tiny_llama
import torch
from golden_cases import FOLDER
from safetensors import safe_open
from safetensors.torch import save_file

from suture import merge_files
from suture.checkpoints import open_checkpoint
from suture.errors import CheckpointError

with safe_open(FOLDER / "low_precision.safetensors", "pt") as _file:
    CASES = json.loads(_file.metadata()["cases"])
    _STORED = {name: _file.get_tensor(name) for name in _file.keys()}  # noqa: SIM118  (it is no mapping)


def tensors(case):
    """The stored tensors of a case, and the decoded ones."""
    found = {name.partition(":")[2]: _STORED[name] for name in _STORED if name.startswith(f"{case}:")}
    wanted = {name.removeprefix("wanted/"): t for name, t in found.items() if name.startswith("wanted/")}
    return {name: t for name, t in found.items() if not name.startswith("wanted/")}, wanted


def save_model(folder, stored, **settings):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(stored, folder / "model.safetensors")
    config = {"model_type": "llama", "dtype": "float32", "quantization_config": {"quant_method": "any", **settings}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_codes_are_decoded_as_their_own_library_decodes_them(case, tmp_path):
    stored, wanted = tensors(case)
    opened = open_checkpoint(save_model(tmp_path / "m", stored, **CASES[case].get("settings", {})))
    assert set(opened) == set(wanted)
    assert opened.decoded
    for name, tensor in wanted.items():
        assert opened.specs[name].shape == tuple(tensor.shape)
        whole = opened.flat(name)[:]
        exact = tensor.reshape(-1).float()
        tolerance = 2**-8 if tensor.dtype == torch.bfloat16 else 2**-10 if tensor.dtype == torch.float16 else 1e-6
        torch.testing.assert_close(whole, exact, rtol=tolerance, atol=tolerance * float(exact.abs().max()))
        for start, stop in ((0, 1), (5, 6), (3, 47), (31, 130), (64, 65), (len(whole) - 9, len(whole))):
            assert torch.equal(opened.flat(name)[start:stop], whole[start:stop]), (start, stop)
        torch.testing.assert_close(opened[name].float().reshape(-1), whole, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", ["task_arithmetic", "ties_merging"])
def test_a_merge_of_coded_models_is_that_of_their_decoded_copies(case, method, tmp_path):
    stored, wanted = tensors(case)
    settings = CASES[case].get("settings", {})
    coded = save_model(tmp_path / "coded", stored, **settings)
    plain = {name: open_checkpoint(coded).flat(name)[:].view(t.shape).clone() for name, t in wanted.items()}
    torch.manual_seed(1)
    other = {name: tensor + 0.1 * torch.randn(tensor.shape) for name, tensor in plain.items()}
    options = {"dtype": "float32", "mixed_dtypes": True}
    found = merge_files(coded, {"a": other, "b": coded}, method, tmp_path / "one", **options)
    expected = merge_files(plain, {"a": other, "b": plain}, method, tmp_path / "two", **options)
    merged, same = tiny_llama.tensors(found), tiny_llama.tensors(expected)
    assert all(torch.equal(merged[name], same[name]) for name in same)
    assert "quantization_config" not in json.loads((found / "config.json").read_text())


def test_the_result_of_coded_models_has_the_dtype_of_their_configuration(tmp_path):
    stored, _ = tensors("deepseek")
    coded = save_model(tmp_path / "coded", stored)
    config = json.loads((coded / "config.json").read_text())
    (coded / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    out = merge_files(coded, {"a": coded}, "task_arithmetic", tmp_path / "out")
    assert tiny_llama.tensors(out)["h.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("case", "change", "found"),
    [
        ("deepseek", {"h.weight_scale_inv": torch.ones(3, 7)}, "scales of shape"),
        ("mxfp4", {"mlp.experts.down_proj_scales": torch.ones(3, 9, 2, dtype=torch.uint8)}, "blocks"),
        ("bnb_int8", {"h.SCB": torch.ones(5)}, "codes"),
        ("bnb_nf4", {"h.weight.absmax": torch.ones(2)}, "scales, not those of"),
        ("bnb_nf4", {"h.weight.quant_state.bitsandbytes__nf4": torch.ones(9, dtype=torch.uint8)}, "quant_state"),
        ("gptq4", {"h.scales": torch.ones(4, 15)}, "codes"),
        ("gptq4", {"h.g_idx": torch.ones(7, dtype=torch.int32)}, "a g_idx of another length"),
        ("awq", {"h.qzeros": torch.ones(4, 2, dtype=torch.int32)}, "codes"),
        ("ct_pack4", {"h.weight_shape": torch.tensor([16, 99])}, "codes"),
        ("ct_pack4", {"h.weight_g_idx": torch.zeros(32, dtype=torch.int32)}, "an order of inputs"),
    ],
)
def test_scales_that_do_not_fit_their_codes_are_refused_by_name(case, change, found, tmp_path):
    stored, _ = tensors(case)
    folder = save_model(tmp_path / "m", stored | change, **CASES[case].get("settings", {}))
    with pytest.raises(CheckpointError, match=found) as refusal:
        open_checkpoint(folder)
    assert "\n" not in str(refusal.value)


def test_an_adapter_on_codes_is_added_to_the_decoded_weights(tmp_path):
    from suture.checkpoints import open_fine_tuned

    stored, _ = tensors("bnb_nf4_nested")
    base = open_checkpoint(save_model(tmp_path / "base", stored))
    up, down = torch.randn(24, 2), torch.randn(2, 40)
    folder = tmp_path / "adapter"
    folder.mkdir()
    names = {"base_model.model.h.lora_A.weight": down, "base_model.model.h.lora_B.weight": up}
    save_file(names, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    tuned = open_fine_tuned(folder, base)
    wanted = base.flat("h.weight")[:].view(24, 40) + up @ down
    torch.testing.assert_close(tuned.flat("h.weight")[:].view(24, 40), wanted)
