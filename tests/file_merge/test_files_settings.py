"""Knobs that differ from tensor to tensor, and plans."""

import re
import shlex
from pathlib import Path

import pytest
import tiny_llama
import torch

import suture
from suture import get_method, merge_files, plan_files
from suture.cli.main import main
from suture.errors import ConfigError
from suture.file_merge.tensor_knobs import depth_of, value_at
from suture.pipeline import config

NAMES = ["embed.weight", "layers.0.attn.w", "layers.0.mlp.w", "layers.4.attn.w", "layers.4.mlp.w", "layers.2.mlp.w"]


@pytest.fixture
def models():
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(30, generator=generator) for name in NAMES}
    return base, [{name: t + torch.randn(30, generator=generator) for name, t in base.items()} for _ in range(2)]


def test_a_gradient_goes_in_straight_lines_from_the_first_layer_to_the_last():
    depth = depth_of(NAMES)
    values = {name: value_at([0.0, 1.0, 3.0], name, depth(name)) for name in NAMES}
    assert values["layers.0.attn.w"] == 0.0
    assert values["layers.2.mlp.w"] == 1.0
    assert values["layers.4.mlp.w"] == 3.0
    assert values["embed.weight"] == 0.0
    assert value_at([0.0, 1.0, 3.0], "", 0.75) == 2.0


def test_the_first_filter_that_fits_counts(models, tmp_path):
    rules = [{"filter": "mlp", "value": [0.0, 1.0]}, {"filter": "layers.4", "value": 0.9}]
    found = tiny_llama.tensors(merge_files(*models, "task_arithmetic", tmp_path / "out", scaling_factor=rules))
    wanted = {"layers.0.mlp.w": 0.0, "layers.2.mlp.w": 0.5, "layers.4.mlp.w": 1.0, "layers.4.attn.w": 0.9}
    for name in NAMES:
        expected = suture.merge(*models, "task_arithmetic", scaling_factor=wanted.get(name, 0.3))
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"scaling_factor": [{"filtre": "mlp", "value": 1}]}, "Did you mean 'filter'"),
        ({"scaling_factor": ["a", "b"]}, "is no gradient"),
        ({"threshold": [10, 20]}, "method.threshold differs between tensors"),
        ({"threshold": [{"filter": "mlp", "value": 500}]}, "method.threshold=500 does not fit ties_merging"),
        ({"scaling_fator": [0.1, 0.2]}, "Did you mean 'scaling_factor'"),
    ],
)
def test_what_does_not_fit_is_one_line(models, tmp_path, knobs, message):
    with pytest.raises(ConfigError) as refusal:
        merge_files(*models, "ties_merging", tmp_path / "out", **knobs)
    assert message in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_over_one_tensor_a_threshold_may_differ(models, tmp_path):
    rules = [{"filter": "mlp", "value": 50.0}]
    out = merge_files(*models, "ties_merging", tmp_path / "out", scope="tensor", threshold=rules)
    half = suture.merge(*models, "ties_merging", scope="tensor", threshold=50.0)
    assert torch.equal(tiny_llama.tensors(out)["layers.0.mlp.w"], half["layers.0.mlp.w"])


def test_a_model_may_have_its_own_weight(models, tmp_path):
    out = merge_files(*models, "task_arithmetic", tmp_path / "out", scaling_factor=1.0, weights=[0.25, 0.5])
    base, (one, two) = models
    for name, tensor in tiny_llama.tensors(out).items():
        expected = base[name] + 0.25 * (one[name] - base[name]) + 0.5 * (two[name] - base[name])
        torch.testing.assert_close(tensor, expected)


def test_the_command_line_takes_filters_and_gradients(models, tmp_path):
    suture.save_checkpoint(models[0], tmp_path / "base.safetensors")
    suture.save_checkpoint(models[1][0], tmp_path / "one.safetensors")
    words = [f"base={tmp_path}/base.safetensors", f"models.one={tmp_path}/one.safetensors", "method=task_arithmetic"]
    told = "method.scaling_factor=[{filter:mlp,value:[0.0,1.0]},{value:0.5}]"
    assert main(["merge", *words, told, f"output={tmp_path}/out"]) == 0
    found = tiny_llama.tensors(tmp_path / "out")
    assert torch.equal(found["layers.0.mlp.w"], models[0]["layers.0.mlp.w"])
    half = suture.merge(models[0], {"one": models[1][0]}, "task_arithmetic", scaling_factor=0.5)
    assert torch.equal(found["embed.weight"], half["embed.weight"])


@pytest.mark.parametrize("method", ["task_arithmetic", "ties_merging", "della", "slerp"])
def test_a_plan_says_bytes_and_passes_and_leaves_nothing(models, tmp_path, method):
    base, tuned = models
    suture.save_checkpoint(base, tmp_path / "base.safetensors")
    paths = []
    for i, tensors in enumerate(tuned[: 1 if method == "slerp" else 2]):
        suture.save_checkpoint(tensors, tmp_path / f"{i}.safetensors")
        paths.append(tmp_path / f"{i}.safetensors")
    before = sorted(tmp_path.iterdir())
    plan = plan_files(tmp_path / "base.safetensors", paths, method, tmp_path / "out", dtype="bfloat16")
    assert sorted(tmp_path.iterdir()) == before
    assert plan.passes == (2 if method == "ties_merging" else 1)
    assert plan.bytes_read == plan.passes * (1 + len(paths)) * 6 * 30 * 4
    assert plan.bytes_written == 6 * 30 * 2
    assert min(plan.read_speed, plan.write_speed, plan.compute_speed, plan.seconds) > 0
    assert plan.memory < 300e6


def test_the_command_line_shows_the_plan_of_a_share(models, tmp_path, capsys):
    suture.save_checkpoint(models[0], tmp_path / "base.safetensors")
    words = [f"base={tmp_path}/base.safetensors", f"models.one={tmp_path}/base.safetensors", "method=task_arithmetic"]
    assert main(["merge", *words, f"output={tmp_path}/out", "--plan", "--shard", "1/3"]) == 0
    told = capsys.readouterr().out
    assert "merge    2 tensors, 60 parameters" in told
    assert "in 1 pass" in told
    assert not (tmp_path / "out").exists()


def commands():
    """What README and documentation say to type, without what is left out by ellipsis."""
    root = Path(__file__).parent.parent.parent
    text = (root / "README.md").read_text("utf-8") + (root / "docs" / "merging-files.md").read_text("utf-8")
    return [words for words in re.findall(r"^    suture merge (.*)$", text, re.M) if "…" not in words]


@pytest.mark.parametrize("words", commands())
def test_commands_in_the_documentation_compose(words):
    found = config.compose_merging(shlex.split(words))
    assert found["output"]
    assert found["mergekit"] or get_method(found["method"]["name"])
    assert found["mergekit"] or found["models"]


def test_the_documentation_has_commands():
    assert len(commands()) >= 4
