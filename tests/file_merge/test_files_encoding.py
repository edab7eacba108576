"""Merged models in the codes of their base: near the plain result, read by the same decoder, with the error told."""

import json
import sys

import pytest
import torch
from golden_cases import FOLDER
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from suture import merge_files, open_checkpoint, plan_files
from suture.checkpoints.checkpoint import DTYPES
from suture.cli.main import main
from suture.errors import ConfigError

with safe_open(FOLDER / "low_precision.safetensors", "pt") as _file:
    CASES = json.loads(_file.metadata()["cases"])
    _STORED = {name: _file.get_tensor(name) for name in _file.keys()}  # noqa: SIM118  (it is no mapping)

# The error that codes add to weights: half a step of 8, 4 and 3 bits, relative to the norm.
WRITTEN = {
    "deepseek": 0.03,
    "ct_fp8_tensor": 0.03,
    "ct_fp8_channel": 0.03,
    "ct_int8_channel": 0.01,
    "mxfp4": 0.15,
    "bnb_int8": 0.01,
    "bnb_nf4": 0.12,
}


def coded(folder, stored, **settings):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(stored, folder / "model.safetensors")
    config = {"model_type": "llama", "dtype": "float32", "quantization_config": {"quant_method": "any", **settings}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def case(folder, name, **more):
    """A model directory with the codes of a case, which its own library made."""
    found = {key.partition(":")[2]: _STORED[key] for key in _STORED if key.startswith(f"{name}:")}
    stored = {key: tensor for key, tensor in found.items() if not key.startswith("wanted/")}
    return coded(folder, stored | more, **CASES[name].get("settings", {}))


def plain_copy(folder):
    opened = open_checkpoint(folder)
    return {name: opened.flat(name)[:].view(spec.shape).float() for name, spec in opened.specs.items()}


def moved(weights, size=0.1):
    generator = torch.Generator().manual_seed(1)
    return {n: t + size * t.std() * torch.randn(t.shape, generator=generator) for n, t in weights.items()}


def test_there_is_a_case_for_every_format_that_is_written():
    assert set(WRITTEN) <= set(CASES), sorted(CASES)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_merge_in_the_codes_of_the_base_is_near_the_plain_merge(name, tmp_path):
    base = case(tmp_path / "base", name)
    tuned = moved(plain_copy(base))
    options = {"scaling_factor": 1.0, "mixed_dtypes": True}
    out = merge_files(base, {"a": tuned}, "task_arithmetic", tmp_path / "out", encode="input", **options)
    plain = merge_files(base, {"a": tuned}, "task_arithmetic", tmp_path / "plain", dtype="float32", **options)
    stored, given = load_file(out / "model.safetensors"), load_file(base / "model.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in stored.items()} == {n: (t.shape, t.dtype) for n, t in given.items()}
    record = json.loads((out / "suture_merge.json").read_text())["encoding"]
    found, wanted = plain_copy(out), load_file(plain / "model.safetensors")
    assert "quantization_config" in json.loads((out / "config.json").read_text())
    for key, error in record["tensors"].items():
        measured = float((found[key] - wanted[key].float()).norm() / wanted[key].float().norm())
        assert measured == pytest.approx(error, rel=1e-3)
        assert 0 < error < WRITTEN[name]


@pytest.mark.parametrize("name", WRITTEN)
def test_what_stays_at_the_base_keeps_its_codes_bit_for_bit(name, tmp_path):
    base = case(tmp_path / "base", name, plain=torch.ones(2))
    options = {"encode": "input", "mixed_dtypes": True, "only": ["plain"]}
    out = merge_files(base, {"a": moved(plain_copy(base))}, "task_arithmetic", tmp_path / "out", **options)
    stored, given = load_file(out / "model.safetensors"), load_file(base / "model.safetensors")
    assert all(torch.equal(stored[n].view(torch.uint8), given[n].view(torch.uint8)) for n in given if given[n].dim())
    assert json.loads((out / "suture_merge.json").read_text())["encoding"]["relative_error"] == 0


@pytest.mark.parametrize("name", sorted(set(CASES) - set(WRITTEN) - {"bnb_fp4"}))
def test_codes_that_are_only_read_are_refused_by_their_name_or_written(name, tmp_path):
    base = case(tmp_path / "base", name)
    opened = open_checkpoint(base)
    options = {"encode": "input", "mixed_dtypes": True}
    if all(each.encode for each in opened.codes.values()):
        out = merge_files(base, {"a": moved(plain_copy(base))}, "task_arithmetic", tmp_path / "out", **options)
        assert json.loads((out / "suture_merge.json").read_text())["encoding"]["relative_error"] < 0.2
        return
    with pytest.raises(ConfigError, match="are read and not written. Remedy: leave out encode"):
        merge_files(base, [plain_copy(base)], "task_arithmetic", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


GRIDS = {
    "tensor": ((), (1, 1)),
    "row": ((1, 96), (70, 1)),
    "group": ((1, 32), (70, 3)),
    "block": ((32, 32), (3, 3)),
}


@pytest.mark.parametrize("scales", ["float32", "bfloat16", "float8_e8m0fnu", "uint8"])
@pytest.mark.parametrize("codes", ["float8_e4m3fn", "float8_e5m2", "int8"])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("chunk", [64, 1 << 20])
def test_each_block_has_a_scale_of_its_own_size_whatever_the_slices(grid, codes, scales, chunk, tmp_path, monkeypatch):
    if not hasattr(torch, scales) or getattr(torch, scales) not in DTYPES.values():
        pytest.skip(f"this torch has no {scales}")
    monkeypatch.setattr("suture.checkpoints.encoding._SLICE", chunk)
    block, shape = GRIDS[grid]
    torch.manual_seed(0)
    sizes = torch.logspace(-3, 3, 70)[:, None] if grid != "tensor" else 1.0
    wanted = {"h.weight": torch.randn(70, 96) * sizes}
    stored = {
        "h.weight": torch.zeros(70, 96).to(getattr(torch, codes)),
        "h.weight_scale": torch.ones(shape).to(getattr(torch, scales)),
    }
    base = coded(tmp_path / "base", stored, weight_block_size=list(block or (70, 96)))
    options = {"scaling_factor": 1.0, "encode": "input", "mixed_dtypes": True}
    out = merge_files(base, [wanted], "task_arithmetic", tmp_path / "out", **options)
    found, exact = plain_copy(out)["h.weight"], wanted["h.weight"] - (plain_copy(base)["h.weight"] * 0)
    height, width = block or (70, 96)
    step = {"float8_e4m3fn": 2**-4, "float8_e5m2": 2**-3, "int8": 1 / 127}[codes]
    step *= 2 if scales in ("uint8", "float8_e8m0fnu") and codes == "int8" else 1.02
    for top in range(0, 70, height):
        for left in range(0, 96, width):
            part = (slice(top, top + height), slice(left, left + width))
            assert (found[part] - exact[part]).abs().max() <= step * exact[part].abs().max()


def test_an_int8_tensor_with_zeros_is_written_with_zeros(tmp_path):
    torch.manual_seed(0)
    wanted = {"h.weight": torch.rand(16, 32) + 1.0}
    stored = {
        "h.weight": torch.zeros(16, 32, dtype=torch.int8),
        "h.weight_scale": torch.ones(16, 1),
        "h.weight_zero_point": torch.zeros(16, 1, dtype=torch.int8),
    }
    base = coded(tmp_path / "base", stored)
    options = {"scaling_factor": 1.0, "encode": "input", "mixed_dtypes": True}
    out = merge_files(base, [wanted], "task_arithmetic", tmp_path / "out", **options)
    assert (plain_copy(out)["h.weight"] - wanted["h.weight"]).abs().max() <= 2.0 / 255
    assert load_file(out / "model.safetensors")["h.weight_zero_point"].tolist() == [[-128]] * 16


def test_the_nearest_codes_of_mxfp4_by_hand(tmp_path):
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.5, -6.0, 5.4, 0.9] + [0.0] * 20)
    wanted = {"mlp.experts.down_proj": torch.stack([values, values * 2.0**-7], 1)[None]}
    stored = {
        "mlp.experts.down_proj_blocks": torch.zeros(1, 2, 1, 16, dtype=torch.uint8),
        "mlp.experts.down_proj_scales": torch.zeros(1, 2, 1, dtype=torch.uint8),
    }
    base = coded(tmp_path / "base", stored)
    options = {"scaling_factor": 1.0, "encode": "input", "mixed_dtypes": True}
    out = merge_files(base, [wanted], "task_arithmetic", tmp_path / "out", **options)
    found = plain_copy(out)["mlp.experts.down_proj"][0]
    near = values.clone()
    near[10], near[11] = 6.0, 1.0
    assert torch.equal(found[:, 0], near)
    assert torch.equal(found[:, 1], near * 2.0**-7)


def test_several_shards_plain_tensors_and_ties_go_along(tmp_path):
    torch.manual_seed(0)
    table = torch.randn(8, 32)
    stored = {
        **{f"{i}.weight": torch.randn(64, 64).to(torch.float8_e4m3fn) for i in range(3)},
        **{f"{i}.weight_scale_inv": torch.rand(2, 2) for i in range(3)},
        **{f"{i}.input_scale": torch.rand(1) for i in range(3)},
        "embed.weight": table,
        "norm.weight": torch.rand(64),
    }
    base = coded(tmp_path / "base", stored, weight_block_size=[32, 32])
    tuned = moved(plain_copy(base))
    options = {"encode": "input", "scaling_factor": 1.0, "mixed_dtypes": True, "shard_size": 5000}
    plan = plan_files(base, [tuned], "task_arithmetic", tmp_path / "out", **options)
    assert plan.bytes_written > 3 * 64 * 64 * 5
    out = merge_files(base, [tuned], "task_arithmetic", tmp_path / "out", **options)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(stored)
    opened = open_checkpoint(out)
    assert torch.equal(opened["norm.weight"], tuned["norm.weight"].to(opened["norm.weight"].dtype))
    shard = load_file(out / index["weight_map"]["0.input_scale"])
    assert torch.equal(shard["0.input_scale"], stored["0.input_scale"])
    assert not list(tmp_path.glob(".out*"))


def test_an_interrupted_encoding_resumes_with_the_same_bits(tmp_path, monkeypatch):
    base = case(tmp_path / "base", "deepseek")
    tuned = moved(plain_copy(base))
    options = {"encode": "input", "mixed_dtypes": True}
    whole = merge_files(base, [tuned], "task_arithmetic", tmp_path / "whole", **options)

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("suture.file_merge.job.record_error", killed)
        merge_files(base, [tuned], "task_arithmetic", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    out = merge_files(base, [tuned], "task_arithmetic", tmp_path / "out", **options)
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"encode": "output"}, "encode"),
        ({"encode": "input", "dtype": "bfloat16"}, "leave out one of the two"),
        ({"encode": "input"}, "holds no codes"),
    ],
)
def test_what_cannot_be_encoded_is_refused_before_any_work(options, found, tmp_path):
    base = {"w": torch.ones(2, 2)}
    with pytest.raises(ConfigError, match=found):
        merge_files(base, [base], "task_arithmetic", tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_the_command_line_says_what_the_codes_cost(tmp_path, capsys, monkeypatch):
    base, other = case(tmp_path / "base", "deepseek"), case(tmp_path / "other", "deepseek")
    words = [f"base={base}", f"models.a={other}", "method=simple_average", f"output={tmp_path / 'out'}"]
    monkeypatch.setattr(sys, "argv", ["suture", "merge", *words, "encode=input"])
    assert main(["merge", *words, "encode=input"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "which changes the merged weights by" in text
