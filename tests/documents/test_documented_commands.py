"""Every command that users of this field already type, on a cache of tiny models and data under the same names."""

import json
from pathlib import Path

import pytest
import stand_ins

from suture.checkpoints import open_checkpoint
from suture.cli.main import main
from suture.pipeline.config import compose
from suture.pipeline.settings import Settings

datasets = pytest.importorskip("datasets")

B32 = "modelpool=CLIPVisionModelPool/clip-vit-base-patch32"
TASKS = "taskpool=CLIPVisionModelTaskPool/clip-vit-classification"
TA8 = "modelpool=clip-vit-base-patch32_TA8 taskpool=clip-vit-classification_TA8"
LAYER_WISE = """
    method=adamerging method.name=clip_layer_wise_adamerging method.save_merging_weights=merging_weights.pt
    modelpool=clip-vit-base-patch32_TA8 taskpool=clip-vit-classification_TA8
    fabric.loggers.root_dir=outputs/logs/ViT-B-32 fabric.loggers.name=clip_layer_wise_adamerging_adam"""
SURGERY = f"""
    method=surgery/adamerging_surgery method.surgery_steps=1000 method.eval_iterations=200 method.max_steps=1000
    method.lr=0.001 {B32}_TA8 {TASKS}_TA8"""
TWO = f"{B32}_svhn_and_mnist taskpool=CLIPVisionModelTaskPool/clip-vit-base-patch32_svhn_and_mnist"

COMMANDS = {
    "ties": f"method=ties_merging {TA8}",
    "ties with keys": "method=ties_merging method.scaling_factor=0.3 method.threshold=20 method.merge_func=sum " + TWO,
    "model only": f"method=ties_merging {B32}_TA8_model_only {TASKS}_TA8",
    "layer-wise": LAYER_WISE,
    "task-wise": f"method=adamerging method.name=clip_task_wise_adamerging {TA8}",
    "surgery": SURGERY,
}
LEARNED = ["tw_adamerging", "lw_adamerging", "tw_adamergingpp", "lw_adamergingpp"]
ALIASES = ["weight_averaging", "task_arithmetic", "ties_merging", *LEARNED]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return stand_ins.build(tmp_path_factory.mktemp("hub"))


@pytest.fixture(autouse=True)
def hub(cache, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache / "tables"))
    monkeypatch.chdir(tmp_path)


def ran(words) -> dict:
    assert main([*words, "output=out"]) == 0
    return json.loads(Path("out/report.json").read_text())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_documented_command_runs(command):
    report = ran([*COMMANDS[command].split(), "fast_dev_run=true"])
    assert len(report["samples"]) == (2 if "svhn_and_mnist" in COMMANDS[command] else 8)
    assert set(report["samples"].values()) == {stand_ins.IMAGES}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_documented_command_runs_as_it_stands(command):
    ran(COMMANDS[command].split())


@pytest.mark.parametrize("surgery", ["none", "final", "deep", "online", "blend"])
@pytest.mark.parametrize("method", ALIASES)
def test_every_script_of_the_authors_is_one_command(method, surgery):
    run = Settings.from_config(compose([f"method={method}", *TA8.split(), f"surgery={surgery}"]))
    assert [repair.kind.name for repair in run.repairs] == ([] if surgery == "none" else [surgery])
    assert len(run.pool.models) == len(run.taskpool.tasks) == 8


@pytest.mark.parametrize(("method", "surgery"), list(zip(LEARNED, ["final", "deep", "online", "none"], strict=True)))
def test_scripts_of_the_authors_run(method, surgery):
    report = ran([f"method={method}", *TWO.split(), f"surgery={surgery}", "fast_dev_run=true"])
    assert len(report["rows"]) >= 3


def test_coefficients_are_where_they_were_asked_for():
    ran([*LAYER_WISE.split(), "fast_dev_run=true"])
    assert Path("out/merging_weights.pt").is_file()
    assert any(Path("outputs/logs/ViT-B-32").rglob("metrics.csv"))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's
def test_adapters_from_the_hub_are_merged(cache):
    from peft import LoraConfig, get_peft_model
    from transformers import CLIPVisionModel

    folder = stand_ins.save_tiny_clip(stand_ins.entry(cache, "models", "openai/clip-vit-base-patch16"))
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    for task in stand_ins.EIGHT:
        adapted = get_peft_model(CLIPVisionModel.from_pretrained(folder), config)
        adapted.save_pretrained(stand_ins.entry(cache, "models", f"tanganke/clip-vit-base-patch16_{task}_lora-16"))
    ran(["method=task_arithmetic", "modelpool=clip-vit-base-patch16_TA8_lora", TA8.split()[1]])
    assert "vision_model.post_layernorm.bias" in open_checkpoint("out/model")
