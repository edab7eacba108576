"""Checkpoints of other kinds are called by their names: quantised, wrapped, prefixed, of another library."""

import json

import pytest
import safetensors.torch
import torch
from checkpoint_files import assert_same, refused, small_model
from torch import nn

import suture
from suture.checkpoints import open_checkpoint
from suture.errors import CheckpointError, IncompatibleModels, SutureError

CODES = {"h.weight": torch.ones(4, 2, dtype=torch.int8)}
PACKED = torch.ones(8, 1, dtype=torch.uint8)
QUANTISED = {
    "8-bit weights of bitsandbytes": CODES | {"h.SCB": torch.ones(4)},
    "4-bit weights of bitsandbytes": {
        "h.weight": PACKED,
        "h.weight.absmax": torch.ones(2),
        "h.weight.quant_state.bitsandbytes__nf4": PACKED.clone(),
    },
    "4-bit weights of GPTQ or AWQ": {
        "h.qweight": torch.ones(2, 2, dtype=torch.int32),
        "h.qzeros": torch.ones(1, 1, dtype=torch.int32),
        "h.scales": torch.ones(1, 2, dtype=torch.float16),
    },
    "codes with scales": {"h.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "h.weight_scale": torch.ones(1)},
    "8-bit floating-point weights with scales": {
        "h.weight": torch.ones(4, 4).to(torch.float8_e4m3fn),
        "h.weight_scale_inv": torch.ones(1, 1),
    },
    "4-bit weights of MXFP4": {"e.gate_blocks": PACKED, "e.gate_scales": PACKED.clone()},
    "packed weights of compressed-tensors": {"h.weight_packed": PACKED.int(), "h.weight_scale": torch.ones(1)},
    "weights of HQQ": {"h.W_q": PACKED, "h.scale": torch.ones(1)},
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_models_in_memory_open_but_are_not_merged(kind):
    assert kind in (open_checkpoint(QUANTISED[kind]).quantised or "")
    line = refused(suture.merge, QUANTISED[kind], {"m": QUANTISED[kind]}, "simple_average", kind=IncompatibleModels)
    assert kind in line
    assert "model.dequantize()" in line


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_files_are_decoded_or_refused(kind, tmp_path):
    safetensors.torch.save_file(QUANTISED[kind], tmp_path / "x.safetensors")
    if kind in ("4-bit weights of bitsandbytes", "4-bit weights of GPTQ or AWQ", "4-bit weights of MXFP4"):
        assert "Remedy: " in refused(open_checkpoint, tmp_path / "x.safetensors", kind=CheckpointError)  # damaged ones
        return
    opened = open_checkpoint(tmp_path / "x.safetensors")
    assert bool(opened.decoded) != bool(opened.quantised)
    if opened.decoded:
        assert all(spec.dtype.is_floating_point for spec in opened.specs.values())


def test_what_is_kept_of_a_quantised_model_is_still_quantised():
    opened = open_checkpoint(QUANTISED["8-bit weights of bitsandbytes"])
    assert opened.select({"h.weight": "h.weight"}).quantised == opened.quantised


def test_plain_models_are_not_taken_for_quantised_ones():
    model = {
        "scale": torch.ones(1),
        "norm.scale": torch.ones(2),
        "n.weight": torch.ones(2),
        "ids": torch.ones(2).long(),
    }
    assert open_checkpoint(model).quantised is None


def model_directory(folder, config=None, tokens=("a", "b", "c"), **more):
    folder.mkdir()
    tensors = {"embed.weight": torch.ones(len(tokens) + 1, 2), "h.weight": torch.ones(2, 2)}
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    vocabulary = {"model": {"vocab": {token: row for row, token in enumerate(tokens)}}, **more}
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    return folder


def test_a_directory_whose_configuration_says_quantised_is_not_merged(tmp_path):
    config = {"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}
    base, model = model_directory(tmp_path / "base", config), model_directory(tmp_path / "model")
    line = refused(suture.merge, base, [model], "simple_average", kind=IncompatibleModels)
    assert "is quantised by fp8" in line
    assert "remove quantization_config" in line


@pytest.mark.parametrize("content", [b"[]", b"null", b"", b"\xff", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"])
def test_a_configuration_that_is_no_object_is_refused_before_the_merge(content, tmp_path):
    base, model = model_directory(tmp_path / "base"), model_directory(tmp_path / "model")
    (base / "config.json").write_bytes(content)
    assert "config.json" in refused(suture.merge, base, [model], "simple_average", kind=SutureError)


def test_rows_of_different_tokens_are_not_mixed(tmp_path):
    base = model_directory(tmp_path / "base")
    other = model_directory(tmp_path / "other", tokens=("a", "z", "c"))
    line = refused(suture.merge, base, {"m": other}, "simple_average", kind=IncompatibleModels)
    assert "'m' has the token 'z' in row 1, where the base has 'b'" in line
    assert "vocabulary=union" in line


def test_rows_that_two_models_use_for_different_new_tokens_are_not_mixed(tmp_path):
    models = {
        name: model_directory(tmp_path / name, added_tokens=[{"id": 3, "content": f"<{name}>"}]) for name in ("m", "n")
    }
    base = model_directory(tmp_path / "base")
    suture.merge(base, {"m": models["m"]}, "simple_average")
    line = refused(suture.merge, base, models, "simple_average", kind=IncompatibleModels)
    assert "'n' has the token '<n>' in row 3, where m has '<m>'" in line


def test_reserved_tokens_may_be_given_a_meaning(tmp_path):
    base = model_directory(tmp_path / "base", tokens=("a", "<|reserved_special_token_0|>"))
    model = model_directory(tmp_path / "model", tokens=("a", "<|im_start|>"))
    assert suture.compatibility(open_checkpoint(base), {"m": open_checkpoint(model)}) == []


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_what_data_parallel_and_compile_put_before_all_names_is_left_out(prefix, kind, tmp_path):
    state = small_model().state_dict()
    wrapped = {prefix + name: tensor for name, tensor in state.items()}
    save = safetensors.torch.save_file if kind == "safetensors" else torch.save
    save(wrapped, tmp_path / f"x.{kind}")
    opened = open_checkpoint(tmp_path / f"x.{kind}")
    assert_same(opened, state)
    assert opened.prefix == prefix


def test_a_prefix_of_some_names_only_stays(tmp_path):
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "x.pt")
    assert set(open_checkpoint(tmp_path / "x.pt")) == {"module.a", "b"}


@pytest.mark.parametrize("prefix", ["bert.", "module.", "_orig_mod.", "model.text."])
def test_a_prefix_on_one_side_is_seen_through_and_a_head_on_one_side_is_named(prefix):
    state = dict(small_model().state_dict())
    wrapped = {prefix + name: tensor for name, tensor in state.items()}
    for base, model in ((state, wrapped), (wrapped, state)):
        assert_same(suture.merge(base, {"m": model}, "simple_average"), base)
    headed = wrapped | {"head.weight": torch.ones(2, 2)}
    line = refused(suture.merge, state, {"m": headed}, "simple_average", kind=IncompatibleModels)
    assert "'head.weight' (float32 (2, 2)) is in 'm' but not in the base" in line
    line = refused(suture.merge, headed, {"m": state}, "simple_average", kind=IncompatibleModels)
    assert "'head.weight' is missing in 'm'" in line


def test_two_spellings_of_norms_and_of_weight_normalisation_are_one():
    old, new = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), {}
    for name, tensor in old.state_dict().items():
        new[
            {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}.get(
                name, name
            )
        ] = tensor
    assert_same(suture.merge(old, {"m": new}, "simple_average"), old.state_dict())
    norms = {"a.LayerNorm.weight": torch.ones(3), "a.LayerNorm.bias": torch.zeros(3)}
    given = {"a.LayerNorm.gamma": torch.ones(3) * 3, "a.LayerNorm.beta": torch.ones(3)}
    merged = suture.merge(norms, {"m": given}, "simple_average")
    assert torch.equal(merged["a.LayerNorm.weight"], torch.ones(3) * 3)
    assert torch.equal(merged["a.LayerNorm.bias"], torch.ones(3))


def test_weight_normalisation_is_named():
    plain, old, new = (nn.Sequential(nn.Linear(3, 2)) for _ in range(3))
    nn.utils.parametrizations.weight_norm(new[0])
    weight = old[0].weight.detach()
    stored = {"0.bias": old[0].bias.detach(), "0.weight_g": weight.norm(dim=1, keepdim=True), "0.weight_v": weight}
    for model in (stored, new):
        for base, tuned in ((plain, model), (model, plain)):
            line = refused(suture.merge, base, {"m": tuned}, "simple_average", kind=IncompatibleModels)
            assert "'0.weight' is stored as a direction and a length (weight_norm)" in line


@pytest.mark.parametrize("wrapper", ["net", "params", "params_ema", "teacher", "ema", "state_dict", "module"])
def test_the_one_state_dict_in_a_file_is_found_under_the_usual_keys(wrapper, tmp_path):
    state = small_model().state_dict()
    torch.save({wrapper: state, "epoch": 3, "optimizer": {"state": {0: {"step": torch.ones(1)}}}}, tmp_path / "x.pt")
    assert_same(open_checkpoint(tmp_path / "x.pt"), state)


@pytest.mark.parametrize("wrappers", [("params", "params_ema"), ("student", "teacher"), ("model", "model_ema")])
def test_a_file_of_several_models_is_refused_with_their_keys(wrappers, tmp_path):
    torch.save({name: small_model().state_dict() for name in wrappers}, tmp_path / "x.pt")
    line = refused(open_checkpoint, tmp_path / "x.pt", kind=CheckpointError)
    assert all(repr(name) in line for name in wrappers)
    key = line.partition("torch.load(FILE)['")[2].partition("']")[0]
    torch.save(torch.load(tmp_path / "x.pt", weights_only=True)[key], tmp_path / "y.pt")
    assert_same(open_checkpoint(tmp_path / "y.pt"), small_model().state_dict())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compiled", [torch.jit.script, lambda model: torch.jit.trace(model, torch.ones(2, 3))])
def test_a_torchscript_archive_is_read_for_its_weights(compiled, tmp_path):
    torch.jit.save(compiled(small_model().eval()), tmp_path / "x.pt")
    assert_same(open_checkpoint(tmp_path / "x.pt"), torch.jit.load(tmp_path / "x.pt").state_dict())


def test_a_key_chooses_one_of_several_models_and_must_be_there(tmp_path):
    one, two = small_model().state_dict(), {n: t + 1 for n, t in small_model().state_dict().items()}
    torch.save({"params": one, "params_ema": two, "mine": {"deep": two}}, tmp_path / "x.pt")
    assert_same(open_checkpoint(tmp_path / "x.pt", key="params_ema"), two)
    assert "key=params" in refused(open_checkpoint, tmp_path / "x.pt", kind=CheckpointError)
    merged = suture.merge(tmp_path / "x.pt", [tmp_path / "x.pt"], "simple_average", key="params_ema")
    assert_same(merged, two)
    out = suture.merge_files(tmp_path / "x.pt", [tmp_path / "x.pt"], "simple_average", tmp_path / "o", key="params_ema")
    assert_same(open_checkpoint(out), two)
    torch.save({"state_dict": one}, tmp_path / "y.pt")
    with pytest.raises(CheckpointError, match=r"has no weights under key=params_ema, only under state_dict"):
        open_checkpoint(tmp_path / "y.pt", key="params_ema")


@pytest.mark.parametrize("name", ["x.ggml", "tf_model.h5", "flax_model.msgpack", "model.onnx"])
def test_a_folder_of_another_librarys_weights_names_them(name, tmp_path):
    (tmp_path / name).write_bytes(b"GGUF")
    assert f"only '{name}'" in refused(open_checkpoint, tmp_path, kind=CheckpointError)


def test_a_tangle_of_modules_without_a_tensor_is_refused(tmp_path):
    model: nn.Module = nn.ReLU()
    for _ in range(40):
        model = nn.ModuleDict({"a": model, "b": model})
    torch.save(model, tmp_path / "x.pt")
    assert (tmp_path / "x.pt").stat().st_size < 50_000
    assert "too many parts" in refused(open_checkpoint, tmp_path / "x.pt", kind=CheckpointError)


def test_links_that_lead_nowhere_are_found_when_a_directory_is_opened(tmp_path):
    folder = model_directory(tmp_path / "model")
    (folder / "merges.txt").symlink_to("gone.txt")
    line = refused(open_checkpoint, folder, kind=CheckpointError)
    assert "has the link 'merges.txt', which leads to 'gone.txt'" in line


def test_remedies_name_only_what_their_door_has():
    base, model = {"embed.weight": torch.ones(3, 2)}, {"embed.weight": torch.ones(4, 2)}
    assert "frozen" not in refused(suture.merge, base, {"m": model}, "simple_average", kind=IncompatibleModels)
    opened = open_checkpoint(base), {"m": open_checkpoint(model)}
    assert "under `frozen` in the pool" in suture.compatibility(*opened, pool=True)[0]
