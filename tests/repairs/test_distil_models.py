"""Distilled models of libraries: saved, loaded without suture, and equal."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from tiny_llama import save_base, save_tuned
from tiny_texts import bert_config
from torch import nn

from suture.repairs import repair

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def moved(module, seed):
    """An expert: the module with noise on its floating-point weights."""
    expert = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return expert


def clip(folder):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(**SIZES, image_size=16, patch_size=4, projection_dim=8)
    inputs = [torch.randn(12, 3, 16, 16) for _ in range(2)]
    return CLIPVisionModelWithProjection(config), inputs, lambda m, x: m(pixel_values=x).image_embeds


def texts(count=12):
    rows = []
    for length in (5, 8):
        mask = (torch.arange(length) < torch.randint(2, length + 1, (count, 1))).long()
        rows.append({"input_ids": torch.randint(1, 30, (count, length)) * mask, "attention_mask": mask})
    return rows


def bert(folder):
    from transformers import BertModel

    return BertModel(bert_config(30)), texts(), lambda m, x: m(**x).pooler_output


def resnet(folder):
    from transformers import ResNetConfig, ResNetModel

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    model = ResNetModel(config).train()
    with torch.no_grad():
        model(torch.randn(8, 3, 32, 32) + 1)  # statistics of its own
    return model, [torch.randn(12, 3, 32, 32) for _ in range(2)], lambda m, x: m(x).pooler_output.flatten(1)


def t5_encoder(folder):
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    config.feed_forward_proj = "gated-gelu"  # as in Flan-T5
    config = T5Config(**{**config.to_dict(), "is_gated_act": True, "dense_act_fn": "gelu_new"})
    return T5EncoderModel(config), texts(), lambda m, x: m(**x).last_hidden_state[:, 0]


def llama(folder):
    from transformers import AutoModelForCausalLM

    base = save_base(folder / "base", tied=True)
    save_tuned(folder / "tuned", base, 1)
    model = AutoModelForCausalLM.from_pretrained(base)
    return model, texts(), lambda m, x: m(**x).logits[:, -1]


@pytest.mark.parametrize("options", [{}, {"layers": "blocks"}, {"parameters": "lora", "rank": 2}])
@pytest.mark.parametrize("build", [clip, bert, resnet, t5_encoder, llama])
def test_a_distilled_model_loads_in_its_library_and_gives_the_same_outputs(tmp_path, build, options):
    if build is resnet and "parameters" in options:
        options = {"parameters": "norms"}
    if build is resnet and "layers" in options:
        options = {"layers": "blocks", "blocks": r"encoder\.stages\.\d"}
    torch.manual_seed(0)
    module, inputs, forward = build(tmp_path)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    experts = {task: moved(module, i) for i, task in enumerate("ab")}
    data = dict(zip("ab", inputs, strict=True))
    result = repair(module, experts, data, "distil", steps=5, lr=3e-3, batch_size=12, forward=forward, **options)
    assert result.losses[-1].sum() < result.losses[0].sum()
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert {name: t.dtype for name, t in result.tensors.items()} == {name: t.dtype for name, t in before.items()}

    saved = copy.deepcopy(module)
    saved.load_state_dict(result.tensors)
    saved.save_pretrained(tmp_path / "saved")
    loaded = type(module).from_pretrained(tmp_path / "saved").eval()
    for task, rows in data.items():
        with torch.no_grad():
            torch.testing.assert_close(forward(loaded, rows), result.model(rows, task), rtol=0, atol=1e-6)
    result.model.save(tmp_path / "weights.safetensors")
    file = load_file(tmp_path / "weights.safetensors")
    assert all(torch.equal(tensor, file[name]) for name, tensor in result.tensors.items() if name in file)


def test_attention_of_torch_takes_part_in_lora():
    class Tower(nn.Module):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0].mean(1)

    module, inputs = Tower(0), {"t": torch.randn(12, 4, 8)}
    result = repair(module, {"t": Tower(1)}, inputs, "distil", steps=5, lr=0.01, parameters="lora", rank=2)
    changed = {name for name, t in module.state_dict().items() if not torch.equal(t, result.tensors[name])}
    assert changed == {"attention.in_proj_weight", "attention.out_proj.weight"}
    plain = Tower(0).eval()
    plain.load_state_dict(result.tensors)
    torch.testing.assert_close(plain(inputs["t"]), result.model(inputs["t"]), rtol=0, atol=1e-6)
