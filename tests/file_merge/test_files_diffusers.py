"""Components of diffusers come back under the name that diffusers looks for."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from suture import merge_files, open_checkpoint


def component(folder, value, file="diffusion_pytorch_model.safetensors"):
    folder.mkdir(parents=True)
    save_file({"conv.weight": torch.full((4, 4), value), "conv.bias": torch.full((4,), value)}, folder / file)
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    return folder


@pytest.mark.parametrize("file", ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"])
def test_a_component_keeps_its_file_name(file, tmp_path):
    base, tuned = component(tmp_path / "base", 1.0, file), component(tmp_path / "tuned", 3.0, file)
    out = merge_files(base, [tuned], "task_arithmetic", tmp_path / "out", scaling_factor=0.5)
    assert load_file(out / "diffusion_pytorch_model.safetensors")["conv.bias"].tolist() == [2.0] * 4
    assert not (out / "model.safetensors").exists()
    assert json.loads((out / "config.json").read_text())["_class_name"] == "UNet2DConditionModel"


def test_shards_have_the_index_that_diffusers_reads(tmp_path):
    base, tuned = component(tmp_path / "base", 1.0), component(tmp_path / "tuned", 3.0)
    out = merge_files(base, [tuned], "simple_average", tmp_path / "out", shard_size=64)
    index = json.loads((out / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {
        "diffusion_pytorch_model-00001-of-00002.safetensors",
        "diffusion_pytorch_model-00002-of-00002.safetensors",
    }
    assert open_checkpoint(out)["conv.weight"][0, 0] == 3.0


def test_a_folder_with_two_variants_is_read_as_the_whole_one(tmp_path):
    base = component(tmp_path / "base", 1.0)
    save_file({"conv.weight": torch.zeros(1)}, base / "diffusion_pytorch_model.fp16.safetensors")
    assert open_checkpoint(base)["conv.bias"].tolist() == [1.0] * 4
