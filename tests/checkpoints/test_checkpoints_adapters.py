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


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "eva"])
def test_initialisations_that_leave_the_base_as_it_is_are_read_as_peft_reads_them(base, start, tmp_path):
    from copy import deepcopy

    from peft import LoraConfig, PeftModel, get_peft_model

    options = {"eva_config": _eva_config()} if start == "eva" else {}
    config = LoraConfig(r=2, target_modules=["first"], init_lora_weights=True)
    tuned = get_peft_model(deepcopy(base), config)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn_like(parameter) if parameter.requires_grad else 0)
    tuned.save_pretrained(str(tmp_path))
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**stored, "init_lora_weights": start, **options}))
    wanted = PeftModel.from_pretrained(deepcopy(base), str(tmp_path)).merge_and_unload().state_dict()
    found = open_fine_tuned(tmp_path, open_checkpoint(base))
    for name in open_checkpoint(base):
        torch.testing.assert_close(found[name], wanted[name])


def _eva_config():
    from dataclasses import asdict

    from peft import EvaConfig

    return asdict(EvaConfig())


class _Conv1DNet(nn.Module):
    """Square and other modules of both kinds, as in GPT-2 with a projection of one's own."""

    def __init__(self):
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.c_attn, self.c_proj = Conv1D(12, 4), Conv1D(4, 4)
        self.square, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.square(self.c_proj(self.c_attn(x)[:, :4])))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("targets", [["c_attn", "c_proj"], ["c_proj", "square"], ["c_attn", "c_proj", "square", "out"]])
def test_square_weights_are_turned_where_the_configuration_knows_a_conv1d(targets, tmp_path):
    from copy import deepcopy

    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = _Conv1DNet()
    tuned = get_peft_model(deepcopy(base), LoraConfig(r=2, target_modules=targets, fan_in_fan_out=True))
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn_like(parameter) if parameter.requires_grad else 0)
    tuned.save_pretrained(str(tmp_path / "adapter"))
    wanted = tuned.merge_and_unload().state_dict()
    (tmp_path / "base").mkdir()
    save_file(base.state_dict(), tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "gpt2"}')
    found = open_fine_tuned(tmp_path / "adapter", open_checkpoint(tmp_path / "base"))
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name])
    (tmp_path / "base" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="which may be a Linear or a Conv1D"):
        open_fine_tuned(tmp_path / "adapter", open_checkpoint(tmp_path / "base"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("alora_invocation_tokens", [1, 2]),
        ("lora_bias", "yes"),
        ("trainable_token_indices", [-1]),
        ("target_parameters", {"experts": 1}),
        ("layer_replication", [[0, 2]]),
        ("megatron_config", {"a": 1}),
        ("use_qalora", True),
        ("a_key_of_next_year", 1),
        ("rank_pattern", "x"),
        ("rank_pattern", {"(a+)+$": 2}),
        ("alpha_pattern", {"first": "much"}),
        ("alpha_pattern", {"(": 1}),
        ("r", 0),
        ("r", True),
        ("r", 10**400),
        ("lora_alpha", None),
        ("bias", "some"),
        ("fan_in_fan_out", "yes"),
    ],
)
def test_a_key_that_asks_for_more_than_lora_is_refused_by_its_name(base, tmp_path, key, value):
    save_adapter(tmp_path / "a", factors(), **{key: value})
    with pytest.raises(CheckpointError, match=key) as refusal:
        open_fine_tuned(tmp_path / "a", open_checkpoint(base))
    assert "Remedy: " in str(refusal.value)
    assert str(refusal.value).isprintable()


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("first.lora_E", "a part of LoRA that is not known"),
        ("embed.trainable_tokens_delta", "rows of an embedding"),
        ("first.hada_w1_a", "a factor of LoHa"),
        ("first.ia3_l", "a vector of IA³"),
    ],
)
def test_tensors_of_other_kinds_of_adapter_are_refused_by_what_they_are(base, tmp_path, name, what):
    save_adapter(tmp_path / "a", factors() | {f"base_model.model.{name}": torch.ones(2, 2)})
    with pytest.raises(CheckpointError) as refusal:
        open_fine_tuned(tmp_path / "a", open_checkpoint(base))
    assert f"holds 'base_model.model.{name}', {what}" in str(refusal.value)


def test_a_rank_that_is_not_the_configurations_is_refused(base, tmp_path):
    save_adapter(tmp_path / "a", factors(rank=3))
    with pytest.raises(CheckpointError, match="has factors of rank 3 for 'first', 2 in its configuration"):
        open_fine_tuned(tmp_path / "a", open_checkpoint(base))


def test_an_adapter_on_a_quantised_base_is_refused(tmp_path):
    base = {"first.weight": torch.ones(5, 6, dtype=torch.int8), "first.SCB": torch.ones(5)}
    with pytest.raises(CheckpointError, match="8-bit weights of bitsandbytes"):
        open_fine_tuned(save_adapter(tmp_path / "a", factors()), open_checkpoint(base))


@pytest.mark.parametrize("content", ["null", "[]", "5", ""])
def test_a_configuration_that_is_no_object_is_refused(base, tmp_path, content):
    save_adapter(tmp_path / "a", factors())
    (tmp_path / "a" / "adapter_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"adapter_config.json' (holds a JSON|is not valid JSON)"):
        open_fine_tuned(tmp_path / "a", open_checkpoint(base))


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
        (factors(), {"peft_type": "OFT"}, "an adapter of type 'OFT'"),
        (factors(), {"use_dora": True}, "has no lora_magnitude_vector for 'first', with use_dora=True"),
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
