"""Components of diffusers under the name that diffusers looks for, and whole pipelines."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import suture
from suture import merge_files, open_checkpoint
from suture.cli.main import main
from suture.errors import CheckpointError, OutputError, SutureError


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


def pipeline(folder, value, without=()):
    """A pipeline in small: three components with weights, two without, and one file of all weights beside them."""
    component(folder / "unet", value)
    component(folder / "vae", value)
    component(folder / "text_encoder", value, "model.safetensors")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"steps": int(value)}))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text("{}")
    for name in without:
        shutil.rmtree(folder / name)
    names = ("unet", "vae", "text_encoder", "scheduler", "tokenizer")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "P", **{name: ["l", "C"] for name in names}}))
    save_file({"all": torch.zeros(1)}, folder / "all-in-one.safetensors")
    (folder / "README.md").write_text("the card of the base")
    return folder


def first(folder, file="diffusion_pytorch_model.safetensors"):
    return load_file(folder / file)["conv.bias"][0].item()


def test_every_component_of_a_pipeline_with_weights_is_merged_and_the_rest_is_the_bases(tmp_path):
    base, tuned = pipeline(tmp_path / "base", 1.0), pipeline(tmp_path / "tuned", 3.0)
    out = merge_files(base, {"a": tuned}, "task_arithmetic", tmp_path / "out", scaling_factor=0.5)
    assert (first(out / "unet"), first(out / "vae"), first(out / "text_encoder", "model.safetensors")) == (2, 2, 2)
    for file in ("model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json", "unet/config.json"):
        assert json.loads((out / file).read_text()) == json.loads((base / file).read_text())
    assert not (out / "all-in-one.safetensors").exists()
    assert "the card of the base" not in (out / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out", "tuned"]


def test_a_component_of_a_pipeline_has_the_bytes_of_its_own_merge(tmp_path):
    base, tuned = pipeline(tmp_path / "base", 1.0), pipeline(tmp_path / "tuned", 3.0)
    whole = merge_files(base, {"a": tuned}, "ties_merging", tmp_path / "whole")
    alone = merge_files(base / "unet", {"a": tuned / "unet"}, "ties_merging", tmp_path / "alone")
    file = "diffusion_pytorch_model.safetensors"
    assert (whole / "unet" / file).read_bytes() == (alone / file).read_bytes()


@pytest.mark.parametrize(
    ("choice", "unet", "vae"),
    [({"keep": ["vae"]}, 3, 1), ({"frozen": "va*"}, 3, 1), ({"only": ["vae", "text*"]}, 1, 3)],
)
def test_frozen_keep_and_only_name_components(choice, unet, vae, tmp_path):
    base, tuned = pipeline(tmp_path / "base", 1.0), pipeline(tmp_path / "tuned", 3.0)
    out = merge_files(base, {"a": tuned}, "simple_average", tmp_path / "out", **choice)
    assert (first(out / "unet"), first(out / "vae")) == (unet, vae)


def test_the_same_merge_again_is_done_already_and_another_is_refused_without_overwrite(tmp_path, capsys):
    base, tuned = pipeline(tmp_path / "base", 1.0), pipeline(tmp_path / "tuned", 3.0)
    words = [f"base={base}", f"models.a={tuned}", "method=task_arithmetic", f"output={tmp_path / 'out'}"]
    assert main(["merge", *words]) == 0
    assert f"The merged model is in {tmp_path / 'out'}" in capsys.readouterr().out
    written = (tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    assert main(["merge", *words]) == 0
    assert (tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns == written
    other = [*words, "method.scaling_factor=1.0"]
    with pytest.raises(OutputError, match="already exists"):
        merge_files(base, {"a": tuned}, "task_arithmetic", tmp_path / "out", scaling_factor=1.0)
    assert main(["merge", *other, "overwrite=true"]) == 0
    assert first(tmp_path / "out" / "vae") == 3


def test_a_merge_of_pipelines_that_ended_early_goes_on_and_leaves_nothing_of_the_output(tmp_path, monkeypatch):
    base, tuned = pipeline(tmp_path / "base", 1.0), pipeline(tmp_path / "tuned", 3.0)
    copy = shutil.copytree
    monkeypatch.setattr("shutil.copytree", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OutputError, match="No space left"):
        merge_files(base, {"a": tuned}, "simple_average", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("shutil.copytree", copy)
    out = merge_files(base, {"a": tuned}, "simple_average", tmp_path / "out")
    assert first(out / "unet") == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out", "tuned"]


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        (["less"], {}, r"'a' has no component 'vae', which the base has. Remedy: keep=\[vae\] leaves it at the base"),
        (["tuned/unet"], {}, "'base' is a whole pipeline of diffusers and 'a' is none"),
        (["tuned"], {"keep": ["scheduler"]}, "keep: 'scheduler' is the name of no component with weights"),
        (["tuned"], {"keep": ["*"]}, "has no component to merge"),
        (["tuned"], {"shard": "1/2"}, "shard is not for whole pipelines. Remedy: merge one component, base=.*text_enc"),
    ],
)
def test_pipelines_that_do_not_fit_are_refused_before_anything_is_written(models, options, message, tmp_path):
    base = pipeline(tmp_path / "base", 1.0)
    pipeline(tmp_path / "tuned", 3.0)
    pipeline(tmp_path / "less", 3.0, without=("vae",))
    with pytest.raises(SutureError, match=message):
        merge_files(base, {"a": tmp_path / models[0]}, "simple_average", tmp_path / "out", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "less", "tuned"]


def test_where_no_whole_pipeline_fits_the_component_to_give_is_named(tmp_path):
    base, tuned = pipeline(tmp_path / "base", 1.0), pipeline(tmp_path / "tuned", 3.0)
    with pytest.raises(CheckpointError, match=r"is a whole pipeline of diffusers.* such as '.*/base/text_encoder'"):
        suture.merge(base, [tuned], "simple_average")
    assert open_checkpoint(base / "unet")["conv.bias"][0] == 1
