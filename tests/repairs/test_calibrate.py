"""Calibration: parity with the reference vectors, architectures, traps, and bad input."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from suture import merge
from suture.adaptation.grams import Positions
from suture.adaptation.layer_calls import Call, Layer, Window
from suture.errors import ConfigError, DataError, IncompatibleModels
from suture.repairs import repair
from suture.repairs.anchored import LayerSums, TaskSums
from tests.support import second_family as family


def clip_tower(state):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = family.INDEX["tower"]["config"]
    tower = CLIPVisionModel(CLIPVisionConfig(**config, attn_implementation="eager")).double().eval()
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in tower.state_dict()) else ""
    tower.load_state_dict({prefix + name: tensor for name, tensor in state.items()}, strict=False)
    return tower


def pooled(module, pixels):
    return module(pixel_values=pixels).pooler_output


def merges(base, models):
    """The merges that the towers were calibrated over."""
    double = {"average": merge(base, models, "simple_average")}
    double["task_arithmetic"] = merge(base, models, "task_arithmetic")
    double["ties"] = merge(base, models, "ties_merging")
    return double


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", family.names("tower", "featcal"))
def test_a_calibrated_tower_equals_the_reference(name, dtype):
    knobs = family.INDEX[name]["knobs"]
    base, models, _ = family.inputs(name)
    inputs = {model: family.tensors("tower")["inputs"][t].to(dtype) for t, model in enumerate(models)}
    merged = clip_tower(merges(base, models)[knobs["over"]]).to(dtype)
    experts = {model: clip_tower(state).to(dtype) for model, state in models.items()}
    result = repair(
        merged,
        experts,
        inputs,
        "calibrate",
        forward=pooled,
        base=clip_tower(base).to(dtype).state_dict(),
        encode_batch=5,
        anchor=knobs["rho"],
        ridge=knobs["ridge"],
        mix=knobs["mix"],
        other_tokens=knobs["other"],
    )
    for key, wanted in family.part(name, "merged").items():
        found = result.tensors[key].double()
        atol = 1e-10 if dtype == torch.float64 else 1e-4 * float(wanted.abs().max())
        torch.testing.assert_close(found, wanted, rtol=0, atol=atol)


def sums_of(student, expert, weights, biases, merged, base, layer, *, positions=None, window=None):
    """The solution for one layer from the inputs of both paths."""
    total = LayerSums(ridge=0.05, mix=0.25)
    for x_s, x_e, weight, bias in zip(student, expert, weights, biases, strict=True):
        task = TaskSums(double=x_s.dtype == torch.float64)
        state = {"weight": weight, "bias": bias}
        results = None if layer.kind == "norm" else apply_layer(x_e, weight, bias, window)
        shape = None if layer.kind == "norm" else apply_layer(x_s, weight, bias, window)
        mine, theirs = Call(layer, x_s, shape, window), Call(layer, x_e, results, window)
        task.add({layer: [mine]}, {layer: [theirs]}, positions or Positions(len(x_s)))
        total.add(task, state)
    anchors = {key: (base[key] + 2.2 * (merged[key] - base[key])) for key in base}
    return total.solve(anchors, [layer])[layer][:2]


def apply_layer(x, weight, bias, window):
    if window is None:
        return nn.functional.linear(x, weight, bias)
    return nn.functional.conv2d(x, weight, bias, window.stride, window.padding[0][0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", family.names("layer", "featcal"))
def test_a_layer_equals_the_reference(name, dtype):
    case, t = family.INDEX[name], {key: tensor.to(dtype) for key, tensor in family.tensors(name).items()}
    kind = {"linear": "matrix", "conv": "conv", "layernorm": "norm"}[case["layer"]]
    window, positions = None, None
    if kind == "conv":
        options = case["convolution"]
        sides = ((options["padding"],) * 2,) * 2
        window = Window(tuple(t["weight"].shape[2:]), (options["stride"],) * 2, sides, (1, 1))
    if "token_weights" in t:
        positions = Weighed(t["token_weights"])
    student, expert = t["student"], t.get("expert", t["student"])
    if kind == "norm":
        student = nn.functional.layer_norm(student, student.shape[-1:], eps=case["eps"])
    merged, base = ({part: t[f"{which}_{part}"] for part in ("weight", "bias")} for which in ("merged", "base"))
    layer = Layer(kind, "weight", "bias", 0, len(t["weight"]))
    inputs = (student, expert, t["weights"], t["biases"], merged, base, layer)
    weight, bias = sums_of(*inputs, positions=positions, window=window)
    for found, wanted in ((weight, family.tensors(name)["weight"]), (bias, family.tensors(name)["bias"])):
        atol = 1e-10 if dtype == torch.float64 else 1e-4 * float(wanted.abs().max())
        torch.testing.assert_close(found.view_as(wanted), wanted, rtol=0, atol=atol)


class Weighed(Positions):
    """Rows with given weights."""

    def __init__(self, rows):
        super().__init__(len(rows))
        object.__setattr__(self, "rows", rows)

    def weights(self, shape, *, full=True):
        return self.rows


def noisy(module, seed, scale=0.3):
    """A fine-tune of a module: noise on all its parameters."""
    generator, tuned = torch.Generator().manual_seed(seed), copy.deepcopy(module)
    with torch.no_grad():
        for parameter in tuned.parameters():
            std = parameter.std().nan_to_num(0.1).clamp_min(0.05)
            parameter += scale * std * torch.randn(parameter.shape, generator=generator)
    return tuned


def average(modules):
    merged = copy.deepcopy(modules[0])
    state = merged.state_dict()
    for name, tensor in state.items():
        if tensor.is_floating_point():
            tensor.copy_(torch.stack([module.state_dict()[name] for module in modules]).mean(0))
    return merged


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}


def texts(length, count=20):
    mask = (torch.arange(length) < torch.randint(2, length + 1, (count, 1))).long()
    return {"input_ids": torch.randint(1, 40, (count, length)), "attention_mask": mask}


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(BertConfig(vocab_size=40, num_labels=3, **SMALL))
    return model, {"a": texts(6), "b": texts(8)}, lambda m, x: m(**x).logits


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=1, **SMALL))
    return model, {"a": texts(6), "b": texts(8)}, lambda m, x: m(**x).logits[:, -1]


def llama_first():
    return *llama()[:2], lambda m, x: m(**x).logits[:, 1]


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16))
    return model, {"a": texts(6), "b": texts(8)}, lambda m, x: m(**x).logits[:, -1]


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 20, "num_layers": 2, "num_heads": 2, "feed_forward_proj": "gated-gelu"}
    model = T5ForConditionalGeneration(T5Config(vocab_size=40, decoder_start_token_id=0, **sizes))
    return model, {"a": texts(6), "b": texts(8)}, lambda m, x: m.encoder(**x)[0][:, :2].mean(1)


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(vocab_size=40, num_key_value_heads=1, num_local_experts=3, **SMALL)
    return MixtralForCausalLM(config), {"a": texts(6), "b": texts(8)}, lambda m, x: m(**x).logits[:, -1]


def pictures(count=20):
    return {task: torch.randn(count, 3, 32, 32) for task in ("a", "b")}


def clip():
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(**SMALL, image_size=32, patch_size=8, projection_dim=6)
    return CLIPVisionModelWithProjection(config), pictures(), lambda m, x: m(x).image_embeds


def swin():
    from transformers import SwinConfig, SwinForImageClassification

    sizes = {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4, "num_labels": 5}
    model = SwinForImageClassification(SwinConfig(image_size=32, patch_size=2, **sizes))
    return model, pictures(), lambda m, x: m(x).logits


def resnet():
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], num_labels=5)
    model = ResNetForImageClassification(config).train()
    for _ in range(30):
        model(torch.randn(20, 3, 32, 32))
    return model, pictures(), lambda m, x: m(x).logits


class SequenceFirst(nn.Module):
    """Blocks with `nn.MultiheadAttention`, positions first."""

    def __init__(self):
        super().__init__()
        self.embed, self.blocks = nn.Linear(3, 8), nn.ModuleList(AttentionBlock() for _ in range(2))

    def forward(self, x):
        x = self.embed(x).transpose(0, 1)
        for block in self.blocks:
            x = block(x)
        return x[0]


class AttentionBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attention, self.mlp = nn.LayerNorm(8), nn.MultiheadAttention(8, 2), nn.Linear(8, 8)

    def forward(self, x):
        y = self.norm(x)
        return x + self.attention(y, y, y, need_weights=False)[0] + self.mlp(y).tanh()


def attention():
    return SequenceFirst(), {task: torch.randn(20, 5, 3) for task in ("a", "b")}, lambda m, x: m(x)


def sequential():
    layers = [nn.Conv1d(3, 8, 3, padding=1, groups=1), nn.ReLU(inplace=True), nn.Conv1d(8, 8, 3, groups=4)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(24, 6), nn.Tanh(), nn.Linear(6, 4))
    return model, {task: torch.randn(20, 3, 5) for task in ("a", "b")}, lambda m, x: m(x)


ARCHITECTURES = [clip, bert, llama, gpt2, t5, mixtral, swin, resnet, attention, sequential]
all_architectures = pytest.mark.parametrize("build", ARCHITECTURES, ids=lambda build: build.__name__)


def wide(x):
    """The same inputs in float64."""
    if isinstance(x, dict):
        return {name: wide(tensor) for name, tensor in x.items()}
    return x.double() if x.is_floating_point() else x


def built(build):
    torch.manual_seed(0)
    model, inputs, forward = build()
    return model.eval(), inputs, forward


@all_architectures
def test_one_task_gives_the_expert_back(build):
    module, inputs, forward = built(build)
    expert, x = noisy(module, 1), inputs["a"]
    options = {"forward": forward, "base": expert.state_dict(), "encode_batch": 7}
    result = repair(expert, {"a": expert}, {"a": x}, "calibrate", **options)
    with torch.no_grad():
        found, wanted = forward(result.model.network.module, x), forward(expert, x)
    rough = build is resnet  # its statistics are measured anew, on the few inputs
    torch.testing.assert_close(found, wanted, rtol=0, atol=(0.2 if rough else 1e-4) * float(wanted.abs().max()))
    assert all("rows for" in line or "padding that is sent" in line for line in result.warnings)


@pytest.mark.parametrize(("kind", "knobs"), [("calibrate", {"anchor": 1.0}), ("distil", {"steps": 2, "batch_size": 2})])
@all_architectures
def test_a_model_with_other_weights_is_saved_and_loads_without_suture(build, kind, knobs, tmp_path):
    module, inputs, forward = built(build)
    experts = {task: noisy(module, i) for i, task in enumerate(inputs, start=1)}
    merged = average(list(experts.values()))
    before = {name: tensor.clone() for name, tensor in merged.state_dict().items()}
    given = {"forward": forward, "base": module.state_dict(), "cache": tmp_path}
    result = repair(merged, experts, inputs, kind, **given, **knobs)
    assert all(torch.equal(tensor, before[name]) for name, tensor in merged.state_dict().items())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in result.tensors.items())
    assert kind == "distil" or not list(tmp_path.iterdir())  # only the trained kind keeps what experts gave
    result.model.save(tmp_path / "model.safetensors")
    fresh = copy.deepcopy(module)
    assert not fresh.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False).unexpected_keys
    with torch.no_grad():
        for task, x in inputs.items():
            assert torch.equal(forward(fresh, x), result.model(x, task))


@all_architectures
def test_neither_batches_nor_the_order_of_tasks_matter(build):
    module, inputs, forward = built(build)
    experts = {task: noisy(module, i).double() for i, task in enumerate(inputs, start=1)}
    inputs = {task: wide(x) for task, x in inputs.items()}
    if build is mixtral:
        for each in experts.values():
            each.set_experts_implementation("eager")  # torch's grouped product takes no float64
    merged, base = average(list(experts.values())), module.double().state_dict()
    one = repair(merged, experts, inputs, "calibrate", forward=forward, base=base)
    turned = dict(reversed(inputs.items()))
    other = repair(merged, experts, turned, "calibrate", forward=forward, base=base, encode_batch=3)
    for name, tensor in one.tensors.items():
        torch.testing.assert_close(other.tensors[name], tensor, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("build", [bert, llama_first, t5], ids=lambda build: build.__name__)
def test_padding_never_counts(build):
    module, inputs, forward = built(build)
    experts = {task: noisy(module, i) for i, task in enumerate(inputs, start=1)}
    merged, base = average(list(experts.values())), module.state_dict()
    one = repair(merged, experts, inputs, "calibrate", forward=forward, base=base)
    longer = {task: {key: nn.functional.pad(x, (0, 5)) for key, x in batch.items()} for task, batch in inputs.items()}
    other = repair(merged, experts, longer, "calibrate", forward=forward, base=base)
    for name, tensor in one.tensors.items():
        torch.testing.assert_close(other.tensors[name], tensor, rtol=1e-4, atol=1e-5)


def test_batch_norm_statistics_are_those_of_the_calibrated_path():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    experts = {task: noisy(module, i) for i, task in enumerate("ab", start=1)}
    inputs = {"a": torch.randn(50, 3), "b": 2 + torch.randn(50, 3)}
    result = repair(average(list(experts.values())), experts, inputs, "calibrate", base=module.state_dict())
    solved = result.model.network.module
    values = solved[0](torch.cat(list(inputs.values())))
    torch.testing.assert_close(solved[1].running_mean, values.mean(0))
    torch.testing.assert_close(solved[1].running_var, values.var(0))


def test_experts_that_share_one_module_give_the_same_weights():
    module, inputs, forward = built(clip)
    experts = {task: noisy(module, i) for i, task in enumerate(inputs, start=1)}
    merged, shared = average(list(experts.values())), copy.deepcopy(module)

    def load(task):
        shared.load_state_dict(experts[task].state_dict())
        return shared

    results = [repair(merged, each, inputs, "calibrate", forward=forward, num_passes=2) for each in (experts, load)]
    assert all(torch.equal(results[1].tensors[name], tensor) for name, tensor in results[0].tensors.items())
    assert results[0].passes.merged == 160
    assert results[0].warnings == (
        "There is no base, so weights are anchored at the merged ones. Remedy: repair(…, base=…).",
    )


class Tied(nn.Module):
    """A linear layer used in both blocks, one that nothing reaches, and one used twice in a block."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(TiedBlock() for _ in range(2))
        self.blocks[1].shared = self.blocks[0].shared

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class TiedBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared, self.twice, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return x + self.twice(self.twice(self.shared(x).tanh()).tanh())


def test_shared_layers_and_layers_that_never_run_are_told():
    torch.manual_seed(0)
    module = Tied()
    expert, x = noisy(module, 1), torch.randn(40, 4)
    result = repair(module, {"a": expert}, {"a": x}, "calibrate", base=module.state_dict())
    assert result.warnings == (
        "'blocks.0.shared.weight' is also used as 'blocks.1.shared.weight', 'blocks.1.shared.bias', in another block "
        "or none: left as merged.",
        "No input reaches 'blocks.0.unused.weight': left as merged.",
        "No input reaches 'blocks.1.unused.weight': left as merged.",
    )
    assert torch.equal(result.tensors["blocks.0.shared.weight"], module.blocks[0].shared.weight)
    assert not torch.equal(result.tensors["blocks.0.twice.weight"], module.blocks[0].twice.weight)


def test_too_few_inputs_are_told_and_still_solved():
    module, expert = nn.Sequential(nn.Linear(9, 4)), noisy(nn.Sequential(nn.Linear(9, 4)), 1)
    result = repair(module, {"a": expert}, {"a": torch.randn(2, 9)}, "calibrate", base=module.state_dict())
    assert result.warnings == (
        "'0.weight' has 2 input rows for 9 columns: the ridge decides the rest. Remedy: more inputs.",
    )
    assert all(tensor.isfinite().all() for tensor in result.tensors.values())


def test_bad_input_is_refused_in_one_line():
    module, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(20, 3)
    with pytest.raises(DataError, match=r"Task 'a': the inputs of '0.weight' are not finite in block '0'"):
        repair(module, {"a": module}, {"a": x * torch.nan}, "calibrate")
    wider = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    with pytest.raises(IncompatibleModels, match=r"'0.weight' has shape \(5, 3\) in the expert of task 'a'"):
        repair(module, {"a": wider}, {"a": x}, "calibrate")
    with pytest.raises(ConfigError, match="num_passes"):
        repair(module, {"a": module}, {"a": x}, "calibrate", num_passes=3)
    with pytest.raises(ConfigError, match=r"second_anchor=\[\]"):
        repair(module, {"a": module}, {"a": x}, "calibrate", second_anchor=[])
    with pytest.raises(ConfigError, match="anchor"):
        repair(module, {"a": module}, {"a": x}, "calibrate", anchor=[1.0, -1.0])
    with pytest.raises(IncompatibleModels, match="has no block '7'"):
        repair(module, {"a": module}, {"a": x}, "calibrate", blocks=["7"])


def test_several_anchors_go_from_the_first_block_to_the_last():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    experts, x = {task: noisy(module, i) for i, task in enumerate("ab", start=1)}, torch.randn(9, 3)
    merged, inputs, stiff = average(list(experts.values())), {"a": x, "b": x + 1}, {"ridge": 1e9}
    shared = {"base": module.state_dict(), "blocks": ["0", "1", "2"]}
    found = repair(merged, experts, inputs, "calibrate", anchor=[0.5, 2.5], **stiff, **shared).tensors
    base = module.state_dict()
    for name, tensor in merged.state_dict().items():  # a ridge this large leaves nothing but the anchor
        expected = base[name] + (0.5, 1.5, 2.5)[int(name[0])] * (tensor - base[name])
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)
    one, same = (repair(merged, experts, inputs, "calibrate", anchor=a, **shared).tensors for a in (2.0, [2.0, 2.0]))
    assert all(torch.equal(one[name], same[name]) for name in one)


def test_a_second_pass_has_an_anchor_and_a_mix_of_its_own():
    module, inputs, forward = built(clip)
    experts = {task: noisy(module, i) for i, task in enumerate(inputs, start=1)}
    merged, shared = average(list(experts.values())), {"forward": forward, "base": module.state_dict()}
    first = repair(merged, experts, inputs, "calibrate", mix=0.5, **shared)
    by_hand = repair(first.model.network.module, experts, inputs, "calibrate", mix=1.0, anchor=1.2, **shared)
    knobs = {"mix": 0.5, "num_passes": 2, "second_mix": 1.0, "second_anchor": 1.2}
    both = repair(merged, experts, inputs, "calibrate", **knobs, **shared)
    assert all(torch.equal(both.tensors[name], tensor) for name, tensor in by_hand.tensors.items())
