"""LoRA adapters: the same weights as peft's own merge, as sums and as factors; and what is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import suture
from suture.adaptation import AdaMergingOptions
from suture.adaptation import vectors as rows
from suture.adaptation.vectors import LowRank
from suture.checkpoints import open_checkpoint, open_fine_tuned
from suture.errors import CheckpointError
from suture.merging.task_vectors import open_task_vectors


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4)

    def forward(self, x):
        return self.last(self.norm(self.first(x)).tanh())


@pytest.fixture
def base():
    torch.manual_seed(0)
    return Net().eval()


def save_adapter(folder, tensors, **config):
    """A folder as peft saves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def factors(module="first", out=5, rank=2, inside=6):
    return {
        f"base_model.model.{module}.lora_A.weight": torch.randn(rank, inside),
        f"base_model.model.{module}.lora_B.weight": torch.randn(out, rank),
    }


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["first", "last"]},
        {"target_modules": ["first"], "use_rslora": True},
        {"target_modules": ["first", "last"], "rank_pattern": {"last": 3}, "alpha_pattern": {"first": 7}},
        {"target_modules": ["first"], "modules_to_save": ["last"]},
        {"target_modules": ["last"], "bias": "all"},
    ],
    ids=["plain", "rank-stabilised", "patterns", "saved modules", "biases"],
)
def test_the_weights_are_those_that_peft_merges_to(base, tmp_path, options):
    from copy import deepcopy

    from peft import LoraConfig, get_peft_model

    tuned = get_peft_model(deepcopy(base), LoraConfig(r=2, lora_alpha=5, **options))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    tuned.save_pretrained(str(tmp_path))
    wanted = tuned.merge_and_unload().state_dict()
    found = open_fine_tuned(tmp_path, open_checkpoint(base))
    for name in open_checkpoint(base):
        torch.testing.assert_close(found[name], wanted[name])


def test_adapters_are_merged_like_whole_models(base, tmp_path):
    adapters = {f"t{i}": save_adapter(tmp_path / f"t{i}", factors()) for i in range(3)}
    whole = {name: dict(open_fine_tuned(path, open_checkpoint(base))) for name, path in adapters.items()}
    for method in ("simple_average", "task_arithmetic", "ties_merging"):
        found, wanted = (suture.merge(base, models, method) for models in (adapters, whole))
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), method


def test_adaptation_works_with_the_factors_and_finds_the_same_coefficients(base, tmp_path):
    adapters = {
        "a": save_adapter(tmp_path / "a", factors()),
        "b": save_adapter(tmp_path / "b", factors("last", 4, 3, 5), r=3),
    }
    opened = open_checkpoint(base)
    whole = {name: dict(open_fine_tuned(path, opened)) for name, path in adapters.items()}
    found = rows.task_vector_rows(open_task_vectors(base, adapters), AdaMergingOptions())
    assert all(isinstance(row, LowRank) for row in found.values())
    assert sum(row.up.numel() + row.down.numel() for row in found.values()) < 100
    batches = {name: [torch.randn(8, 6)] for name in adapters}
    options = {"max_steps": 8, "lr": 0.05}
    low, full = (suture.adapt(base, base, models, batches, **options) for models in (adapters, whole))
    torch.testing.assert_close(low.history, full.history, rtol=0, atol=1e-4)
    for name, tensor in full.merged.items():
        torch.testing.assert_close(low.merged[name], tensor, rtol=0, atol=1e-4)


def test_a_transposed_layer_has_its_factors_turned(tmp_path):
    base = {"h.weight": torch.zeros(6, 5)}
    found = open_fine_tuned(save_adapter(tmp_path / "a", factors("h"), fan_in_fan_out=True), open_checkpoint(base))
    weights = open_checkpoint(tmp_path / "a" / "adapter_model.safetensors")
    up, down = (weights[f"base_model.model.h.lora_{side}.weight"] for side in "BA")
    torch.testing.assert_close(found["h.weight"], 2 * (up @ down).T)


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (factors("elsewhere"), {}, "adapts 'elsewhere.weight', which the base lacks"),
        (factors("first", 7), {}, r"for 'first.weight' of shape \(5, 6\)"),
        (dict(list(factors().items())[:1]), {}, "only one of the two factors of 'first.weight'"),
        (factors(), {"peft_type": "IA3"}, "an adapter of type 'IA3'"),
        (factors(), {"use_dora": True}, "asks for use_dora=True, which is not plain LoRA"),
        ({}, {}, "holds no weights"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_in_one_line(base, tmp_path, tensors, config, message):
    save_adapter(tmp_path / "a", tensors, **config)
    with pytest.raises(CheckpointError, match=message) as refusal:
        open_fine_tuned(tmp_path / "a", open_checkpoint(base), label="mine")
    assert "\n" not in str(refusal.value)
    assert "'mine'" in str(refusal.value)


def test_a_folder_without_weights_or_with_a_broken_configuration_is_refused(base, tmp_path):
    folder = save_adapter(tmp_path / "a", factors())
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no adapter_model.safetensors"):
        open_fine_tuned(folder, open_checkpoint(base))
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"is not valid JSON \(JSONDecodeError"):
        open_fine_tuned(folder, open_checkpoint(base))
