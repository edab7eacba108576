"""Kinds of adapter against peft's own merge, in float64: exact, or refused by name."""

import json
import warnings
from copy import deepcopy

import pytest
import torch
from torch import nn

from suture.checkpoints import open_checkpoint, open_fine_tuned
from suture.errors import CheckpointError


class Experts(nn.Module):
    """Fused experts: up as (expert, out, in), down of other sizes."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 7, 6)), nn.Parameter(torch.randn(3, 6, 4))

    def forward(self, x):
        return torch.einsum("eoi,bi->beo", self.up, x).sum((1, 2))


class Net(nn.Module):
    """One module of each kind that adapters change."""

    def __init__(self):
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.embed, self.first, self.second = nn.Embedding(11, 6), nn.Linear(6, 5), nn.Linear(5, 6, bias=False)
        self.turned, self.norm = Conv1D(8, 6), nn.LayerNorm(8)
        self.conv, self.grouped = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, groups=2)
        self.experts, self.head = Experts(), nn.Linear(8, 3)
        self.table = nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        return self.head(self.norm(self.turned(self.second(self.first(self.embed(x))))))


def _lora(**options):
    from peft import LoraConfig

    return LoraConfig(**{"r": 2, "lora_alpha": 5, "target_modules": ["first", "second"], **options})


def _other(kind, **options):
    import peft

    return getattr(peft, kind)(**options)


EXACT = {
    "LoRA": lambda: _lora(),
    "LoRA, all biases trained": lambda: _lora(bias="all"),
    "LoRA, its own biases trained": lambda: _lora(bias="lora_only"),
    "rsLoRA": lambda: _lora(use_rslora=True),
    "LoRA, rank_pattern and alpha_pattern": lambda: _lora(rank_pattern={"second": 3}, alpha_pattern={"first": 7}),
    "rsLoRA with patterns": lambda: _lora(use_rslora=True, rank_pattern={"second": 3}, alpha_pattern={"^first": 7}),
    "LoRA on every kind of layer": lambda: _lora(target_modules=["embed", "first", "turned", "conv"]),
    "LoRA on an embedding": lambda: _lora(target_modules=["embed"]),
    "LoRA on a convolution": lambda: _lora(target_modules=["conv"]),
    "LoRA on Conv1D beside Linear": lambda: _lora(target_modules=["turned", "first"], fan_in_fan_out=True),
    "LoRA with lora_bias": lambda: _lora(target_modules=["first"], lora_bias=True),
    "LoRA with modules_to_save": lambda: _lora(modules_to_save=["head", "norm"]),
    "LoRA with trainable_token_indices": lambda: _lora(trainable_token_indices={"embed": [1, 9]}),
    "LoRA, target_parameters on fused experts": lambda: _lora(target_parameters=["experts.up"]),
    "LoRA, two parameters of the experts": lambda: _lora(target_parameters=["experts.up", "experts.down"]),
    "LoRA, target_parameters with patterns": lambda: _lora(
        target_parameters=["experts.up", "experts.down"], rank_pattern={"experts.up": 3}, alpha_pattern={"down": 9}
    ),
    "DoRA": lambda: _lora(use_dora=True),
    "DoRA on Conv1D": lambda: _lora(use_dora=True, target_modules=["turned"], fan_in_fan_out=True),
    "DoRA on an embedding": lambda: _lora(use_dora=True, target_modules=["embed"]),
    "DoRA on a convolution": lambda: _lora(use_dora=True, target_modules=["conv"]),
    "DoRA with rsLoRA": lambda: _lora(use_dora=True, use_rslora=True),
    "LoRA, gaussian start": lambda: _lora(init_lora_weights="gaussian"),
    "LoRA, orthogonal start": lambda: _lora(init_lora_weights="orthogonal"),
    "IA³": lambda: _other("IA3Config", target_modules=["first", "second"], feedforward_modules=["second"]),
    "IA³ on Conv1D": lambda: _other(
        "IA3Config", target_modules=["turned", "first"], feedforward_modules=["turned"], fan_in_fan_out=True
    ),
    "IA³ on a convolution, outputs": lambda: _other("IA3Config", target_modules=["conv"], feedforward_modules=[]),
    "IA³ on a convolution, inputs": lambda: _other("IA3Config", target_modules=["conv"], feedforward_modules=["conv"]),
    "LoHa": lambda: _other("LoHaConfig", r=2, alpha=3, target_modules=["first", "conv"]),
    "LoHa, effective convolution": lambda: _other(
        "LoHaConfig", r=2, alpha=3, target_modules=["conv"], use_effective_conv2d=True
    ),
    "LoKr": lambda: _other("LoKrConfig", r=2, alpha=3, target_modules=["first", "second", "conv"]),
    "LoKr, both decomposed": lambda: _other(
        "LoKrConfig", r=1, alpha=3, target_modules=["turned_not", "first", "conv"], decompose_both=True
    ),
    "LoKr, effective convolution": lambda: _other(
        "LoKrConfig", r=1, alpha=3, target_modules=["conv"], use_effective_conv2d=True, decompose_factor=2
    ),
    "VeRA": lambda: _other("VeraConfig", r=3, target_modules=["first", "second"]),
    "VeRA, its projections drawn again": lambda: _other(
        "VeraConfig", r=3, target_modules=["first", "second"], save_projection=False, projection_prng_key=5
    ),
    "trainable tokens": lambda: _other("TrainableTokensConfig", target_modules=["embed"], token_indices=[0, 4, 10]),
    "LN tuning": lambda: _other("LNTuningConfig", target_modules=["norm"]),
}
#: Kind → its configuration, and what the refusal names.
REFUSED = {
    "LoRA on a convolution in groups": (lambda: _lora(target_modules=["grouped"]), "a convolution in groups"),
    "AdaLoRA": (lambda: _other("AdaLoraConfig", target_modules=["first"], total_step=10), "'ADALORA'"),
    "OFT": (lambda: _other("OFTConfig", target_modules=["first"], oft_block_size=0, r=1), "'OFT'"),
    "BOFT": (
        lambda: _other("BOFTConfig", target_modules=["second"], boft_block_size=5),
        "'BOFT'",
    ),
    "HRA": (lambda: _other("HRAConfig", r=2, target_modules=["first"]), "'HRA'"),
    "FourierFT": (lambda: _other("FourierFTConfig", n_frequency=3, target_modules=["first"]), "'FOURIERFT'"),
    "SHiRA": (lambda: _other("ShiraConfig", r=1, target_modules=["first"]), "'SHIRA'"),
    "MiSS": (lambda: _other("MissConfig", r=2, target_modules=["second"]), "'MISS'"),
    "RandLoRA": (lambda: _other("RandLoraConfig", r=2, target_modules=["first"]), "'RANDLORA'"),
}
#: Initialisations, as a configuration holds them, and what the refusal says of each.
LOST = {
    "pissa_niter_4": "took a randomised decomposition away from the base",
    "corda": "what the activations of its training data gave",
    "loftq": "quantised the base",
    "lora_ga": "what the gradients of its training data gave",
    "a_start_of_next_year": "is not understood",
}


def trained(base, config, seed=1):
    """A peft model whose trainable parameters are no longer those it began with."""
    from peft import get_peft_model

    torch.manual_seed(seed)
    tuned = get_peft_model(deepcopy(base), config, autocast_adapter_dtype=False)
    for name, tensor in tuned.named_parameters():
        if tensor.requires_grad:
            tensor.data = tensor.data.to(torch.float64 if base.head.weight.dtype == torch.float64 else tensor.dtype)
            with torch.no_grad():
                tensor.add_(torch.rand_like(tensor) + 0.5 if "magnitude" in name else torch.randn_like(tensor))
    return tuned


@pytest.fixture
def base():
    torch.manual_seed(0)
    return Net().double().eval()


def saved(tuned, folder):
    tuned.save_pretrained(str(folder))
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", EXACT)
def test_an_adapter_gives_the_weights_that_peft_merges_to(kind, base, tmp_path, monkeypatch):
    tuned = trained(base, EXACT[kind]())
    folder = saved(tuned, tmp_path / "adapter")
    before = base.state_dict()
    wanted = {name: tensor.clone() for name, tensor in tuned.merge_and_unload().state_dict().items()}
    found = open_fine_tuned(folder, open_checkpoint(base))
    assert set(found) == set(wanted)
    assert any(not torch.equal(wanted[name], before[name]) for name in before)
    for block in (7, 1 << 16):
        monkeypatch.setattr("suture.checkpoints.adapter_updates._BLOCK", block)
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-12, msg=name)
            middle = torch.as_tensor(found.flat(name)[3:8])
            torch.testing.assert_close(middle, tensor.reshape(-1)[3:8], rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_an_adapter_that_is_not_read_is_refused_by_its_kind(kind, base, tmp_path):
    make, named = REFUSED[kind]
    folder = saved(trained(base.float(), make()), tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=named) as refusal:
        open_fine_tuned(folder, open_checkpoint(base))
    assert "merge_and_unload()" in str(refusal.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("module", ["first", "turned"])
def test_a_start_that_the_base_determines_is_undone_as_peft_undoes_it(start, module, base, tmp_path):
    from peft import PeftModel

    if (start, module) == ("olora", "turned"):
        return  # peft cannot merge it
    base = base.float()
    config = _lora(target_modules=[module], init_lora_weights=start, fan_in_fan_out=module == "turned")
    folder = saved(trained(base, config), tmp_path / "adapter")
    wanted = PeftModel.from_pretrained(deepcopy(base), str(folder)).merge_and_unload().state_dict()
    found = open_fine_tuned(folder, open_checkpoint(base))
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("start", LOST)
def test_a_start_that_is_lost_is_refused_by_what_it_did_to_the_base(start, base, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = saved(trained(base, _lora()), tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": start}))
    with pytest.raises(CheckpointError, match=LOST[start]):
        open_fine_tuned(folder, open_checkpoint(base))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_lora_on_one_name_of_a_tied_table_unties_the_files(module, tmp_path):
    """peft's merge changes both names; its model before the merge is the one that was trained."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from suture import merge_files

    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "base")
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=[module])).eval()
    for tensor in tuned.parameters():
        if tensor.requires_grad:
            tensor.data.normal_()
    folder = saved(tuned, tmp_path / "adapter")
    options = {"scaling_factor": 1.0}
    out = merge_files(tmp_path / "base", {"a": folder}, "task_arithmetic", tmp_path / "out", **options)
    tokens = torch.arange(7)[None]
    merged = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(merged(tokens).logits, tuned(tokens).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(CheckpointError, match="which the base ties to"):
        open_fine_tuned(folder, open_checkpoint(tmp_path / "base"))


def test_the_table_of_the_documentation_names_every_kind():
    from pathlib import Path

    page = (Path(__file__).parents[2] / "docs" / "merging-files.md").read_text("utf-8")
    for kind in (*EXACT, *REFUSED):
        assert f"| {kind} |" in page, kind
