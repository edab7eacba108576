"""Repair after every block: parity with the reference vectors, other architectures, layerwise fits, resuming."""

import golden_cases as golden
import pytest
import torch
from torch import nn

from suture.errors import ConfigError, IncompatibleModels
from suture.repairs import Block, Problem, SurgeryModel, find_blocks, repair
from suture.repairs.deep import deep_losses, new_modules
from suture.repairs.fitting import Descent, descend
from suture.repairs.network import FINAL, Network
from suture.storage.resume import Resume


def clip_tower(seed=0, **sizes):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(seed)
    config = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    config |= {"image_size": 16, "patch_size": 8, "projection_dim": 10}
    attention = {"attn_implementation": "eager"}  # as in the reference: its softmax is in float32
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**config | sizes, **attention)).eval().double()


def embeds(module, pixels):
    return module(pixel_values=pixels).image_embeds


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("name", golden.names("surgery_v2"))
def test_the_trajectory_equals_the_reference(name, together):
    case, _, _, tensors = golden.load(name)
    steps, count, batch = tensors["inputs"].shape[:3]
    tasks = [str(t) for t in range(count)]
    towers = {key: clip_tower(**case["config"]) for key in ("merged", *tasks)}
    for key, tower in towers.items():
        prefix = "merged/" if key == "merged" else f"expert_{key}/"
        state = {n.removeprefix(prefix): w for n, w in tensors.items() if n.startswith(prefix)}
        assert not tower.load_state_dict(state, strict=False).unexpected_keys
    inputs = {task: tensors["inputs"][:, t].flatten(0, 1) for t, task in enumerate(tasks)}
    problem = Problem(towers["merged"], towers, inputs, embeds)
    blocks = find_blocks(towers["merged"], inputs["0"], forward=embeds)
    wanted = [problem.expert_rows(task, inputs[task], blocks) for task in tasks]
    repairs = new_modules(problem, blocks, wanted[0], case["rank"], seed=0)
    for i, modules in enumerate(repairs.values()):
        modules.down.data.copy_(torch.stack([tensors[f"down_init/{t}/{i}"] for t in tasks]))
    batches = lambda step: [torch.arange(step * batch, (step + 1) * batch)] * count
    losses = deep_losses(problem, Network(towers["merged"], embeds, blocks), list(repairs.values()), wanted, batches)
    groups = [slice(0, count)] if together else [slice(t, t + 1) for t in range(count)]
    history = descend(Descent(list(repairs.values()), groups, case["lr"], "adam"), steps, losses, repairs)
    torch.testing.assert_close(history, tensors["losses"], rtol=0, atol=1e-9)
    for i, modules in enumerate(repairs.values()):
        for t in range(count):
            torch.testing.assert_close(modules.down[t].detach(), tensors[f"down/{t}/{i}"], rtol=0, atol=1e-9)
            torch.testing.assert_close(modules.up[t].detach(), tensors[f"up/{t}/{i}"], rtol=0, atol=1e-9)


def problem(build=clip_tower, shape=(3, 16, 16), count=20, **options):
    experts = {f"t{i}": build(i + 1, **options) for i in range(2)}
    torch.manual_seed(0)
    inputs = {task: torch.randn(count, *shape, dtype=torch.float64) for task in experts}
    return build(0, **options), experts, inputs


def textbook(module, experts, inputs, order, *, rank, steps, lr, blocks):
    """One task at a time, the expert at every step, gradients through everything, hooks of our own."""
    repairs = new_modules(Problem(module, experts, inputs), blocks, torch.empty(1, 58).double(), rank, seed=0)
    pairs = {
        t: [[nn.Parameter(p[i].detach().clone()) for p in (m.down, m.up)] for m in repairs.values()]
        for i, t in enumerate(experts)
    }
    layers = lambda tower: tower.vision_model.encoder.layers
    history = []
    adams = {t: torch.optim.Adam([p for pair in pair_list for p in pair], lr=lr) for t, pair_list in pairs.items()}
    fix = lambda z, pair: z - (z @ pair[0].T).relu() @ pair[1].T
    for step in range(steps):
        for i, task in enumerate(experts):
            x, seen = inputs[task][order(step)[i]], {"expert": [], "merged": []}
            see = lambda m, a, out, seen=seen: seen["expert"].append(out)

            def correct(m, a, out, seen=seen, task=task):
                seen["merged"].append(fix(out, pairs[task][len(seen["merged"])]))
                return seen["merged"][-1]

            hooks = [layer.register_forward_hook(see) for layer in layers(experts[task])]
            hooks += [layer.register_forward_hook(correct) for layer in layers(module)]
            goal, z = embeds(experts[task], x).detach(), fix(embeds(module, x), pairs[task][-1])
            for hook in hooks:
                hook.remove()
            loss = (z - goal).abs().mean()
            for mine, wanted in zip(seen["merged"], seen["expert"], strict=True):
                loss = loss + (mine.mean(1) - wanted.detach().mean(1)).abs().mean()
            adams[task].zero_grad()
            loss.backward()
            adams[task].step()
            history.append(loss.item())
    return torch.tensor(history, dtype=torch.float64).view(steps, -1)


def test_it_equals_the_loop_that_runs_everything_at_every_step():
    from suture.repairs.problem import Order

    module, experts, inputs = problem()
    blocks = find_blocks(module, inputs["t0"], forward=embeds)
    options = {"rank": 3, "steps": 6, "lr": 0.01}
    expected = textbook(module, experts, inputs, Order(inputs, 6, 4, 0), **options, blocks=blocks)
    result = repair(module, experts, inputs, "deep", **options, batch_size=4, forward=embeds)
    torch.testing.assert_close(result.losses, expected, rtol=0, atol=1e-10)
    assert not any(p.grad is not None for p in experts["t0"].parameters())


@pytest.mark.parametrize(("fit", "variant"), [("joint", "standard"), ("layerwise", "centred")])
def test_twenty_four_blocks_are_found_and_repaired(fit, variant):
    module, experts, inputs = problem(num_hidden_layers=24, hidden_size=8, intermediate_size=16)
    options = {"rank": 4, "steps": 12, "lr": 0.01, "batch_size": 20, "fit": fit, "variant": variant}
    result = repair(module, experts, inputs, "deep", **options, forward=embeds)
    assert len(result.model.layers) == 25
    assert result.model.layers[23] == "vision_model.encoder.layers.23"
    assert (result.losses[-1] < result.losses[0]).all()
    means = 24 * 8 + 10 if variant == "centred" else 0
    assert result.added_parameters == 2 * (24 * 2 * 8 * 4 + 2 * 10 * 4 + means)
    assert set(result.active) == {"t0", "t1"}


def test_layerwise_equals_fitting_the_first_block_alone_and_runs_no_backward_pass_through_blocks():
    module, experts, inputs = problem()
    options = {"rank": 3, "steps": 10, "lr": 0.01, "forward": embeds}
    both = repair(module, experts, inputs, "deep", fit="layerwise", **options)
    joint = repair(module, experts, inputs, "deep", **options)
    first = both.model.layers[0]
    assert both.model.repair_at[first].up.abs().max() > 0
    before, after = both.losses[0], both.losses[-1]
    assert (after < before).all()
    assert not torch.equal(both.model.repair_at[first].up, joint.model.repair_at[first].up)
    torch.testing.assert_close(both.losses[0][0], _first_terms(both, experts["t0"], inputs["t0"]), rtol=0.3, atol=0)


def _first_terms(result, expert, x):
    """The loss of the merged model with the modules before each block already fitted, over all inputs."""
    from suture.repairs.problem import layer_means

    blocks = result.model.network.blocks
    wanted = layer_means(Network(expert, embeds, blocks), x).split([16, 16, 16, 10], dim=1)
    raw = []

    def visit(i, rows):
        raw.append(rows.mean(1))
        return result.model.repairs[i](rows, slice(0, 1))

    with torch.no_grad():
        result.model.network(x, visit)
    return torch.stack([(a - b).abs().mean() for a, b in zip(raw, wanted, strict=True)]).sum()


class Bottleneck(nn.Module):
    def __init__(self, width, out, stride):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.skip = nn.Conv2d(width, out, 1, stride, bias=False)

    def forward(self, x):
        return (self.skip(x) + self.norm(self.conv(x))).relu()


def conv_net(seed=0):
    torch.manual_seed(seed)
    stage = lambda width, out, n: nn.Sequential(
        *(Bottleneck(width if i == 0 else out, out, 1 + (i == 0)) for i in range(n))
    )
    net = nn.Sequential()
    net.stem, net.layer1, net.layer2 = nn.Conv2d(3, 4, 3, padding=1), stage(4, 6, 2), stage(6, 8, 3)
    net.pool, net.flat, net.head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    net.double().train()
    for _ in range(20):
        net(torch.randn(16, 3, 16, 16, dtype=torch.float64))
    return net.eval()


@pytest.mark.parametrize("fit", ["joint", "layerwise"])
def test_a_convolutional_network_is_repaired_on_all_positions_of_all_stages(fit):
    module, experts, inputs = problem(conv_net)
    result = repair(module, experts, inputs, "deep", steps=60, lr=0.01, rank=4, fit=fit)
    assert result.model.network.blocks == (
        Block("layer1.0", 6, 0, 1),
        Block("layer1.1", 6, 0, 1),
        Block("layer2.0", 8, 0, 1),
        Block("layer2.1", 8, 0, 1),
        Block("layer2.2", 8, 0, 1),
    )
    assert (result.losses[-1] < 0.9 * result.losses[0]).all()
    assert torch.equal(module[1][0].norm.running_mean, conv_net(0)[1][0].norm.running_mean)
    trained = module.train()
    repair(trained, experts, inputs, "deep", steps=1)
    assert torch.equal(module[1][0].norm.running_mean, conv_net(0)[1][0].norm.running_mean)


def bert(seed=0):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
    return BertForSequenceClassification(BertConfig(vocab_size=40, num_labels=3, **sizes)).eval().double()


@pytest.mark.parametrize("fit", ["joint", "layerwise"])
@pytest.mark.parametrize("lengths", [(6, 6), (4, 7)])
def test_a_text_classifier_with_masks_is_repaired_whatever_the_lengths(fit, lengths):
    module, experts, _ = problem(bert)
    inputs = {}
    for task, length in zip(experts, lengths, strict=True):
        mask = (torch.arange(length) < torch.randint(2, length + 1, (20, 1))).long()
        inputs[task] = {"input_ids": torch.randint(0, 40, (20, length)) * mask, "attention_mask": mask}
    result = repair(module, experts, inputs, "deep", steps=40, lr=0.01, rank=4, fit=fit)
    assert result.model.layers == ("bert.encoder.layer.0", "bert.encoder.layer.1", FINAL)
    assert (result.losses[-1] < result.losses[0]).all()
    assert result.model(inputs["t1"], "t1").shape == (20, 3)


class SequenceFirst(nn.Module):
    """Tokens (position, batch, width) inside, as in OpenAI's CLIP, and blocks that give tuples."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Tupled(), Tupled()])

    def forward(self, x):
        x = x.transpose(0, 1)
        for block in self.blocks:
            x, _ = block(x)
        return x.mean(0)


class Tupled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        return self.linear(x).tanh(), None


class ChannelsLast(Tupled):
    def forward(self, x):
        return self.linear(x)


def test_sequence_first_and_channels_last_layouts_are_seen():
    module = SequenceFirst().double()
    x = torch.randn(9, 4, 6, dtype=torch.float64)
    assert find_blocks(module, x)[0] == Block("blocks.0", 6, 1, -1)
    expert = SequenceFirst().double()
    result = repair(module, {"t": expert}, {"t": x}, "deep", steps=80, lr=0.01)
    assert (result.losses[-1] < 0.8 * result.losses[0]).all()
    swin = nn.Sequential(nn.Sequential(ChannelsLast(), ChannelsLast()), nn.Flatten())
    assert find_blocks(swin, torch.randn(2, 3, 5, 6))[1] == Block("0.1", 6, 0, -1)
    assert find_blocks(swin, torch.randn(2, 3, 5, 6), channel_axis=1)[1] == Block("0.1", 3, 0, 1)


def test_blocks_may_be_named_or_matched():
    module, _, inputs = problem()
    paths = ["vision_model.encoder.layers.2", "vision_model.encoder.layers.0"]
    find = lambda blocks: [b.path for b in find_blocks(module, inputs["t0"], forward=embeds, blocks=blocks)]
    assert find(paths) == paths[::-1], "in the order in which they run"
    assert find(r"vision_model\.encoder\.layers\.[02]") == paths[::-1]
    assert len(find(None)) == 3
    with pytest.raises(ConfigError, match="a path that matches 'layers'"):
        find("layers")
    with pytest.raises(ConfigError, match="is not a regular expression"):
        find("(")
    with pytest.raises(IncompatibleModels, match="has no block 'encoder'"):
        find(["encoder"])
    with pytest.raises(ConfigError, match=r"has no blocks.*give blocks="):
        find_blocks(nn.Linear(2, 2), torch.ones(2, 2))
    twice = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(ConfigError, match="'0' runs twice"):
        find_blocks(twice, torch.ones(2, 2), forward=lambda m, x: m(m(x)), blocks=["0"])
    with pytest.raises(ConfigError, match="'1' does not run"):
        find_blocks(twice, torch.ones(2, 2), forward=lambda m, x: m[0](x), blocks=["0", "1"])


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    ("fit", "at"), [("joint", 0), ("joint", 4), ("layerwise", 0), ("layerwise", 17), ("layerwise", 29)]
)
def test_a_killed_loop_goes_on_to_the_same_bits(tmp_path, fit, at):
    options = {"steps": 5, "lr": 0.01, "rank": 3, "fit": fit, "forward": embeds, "variant": "centred"}
    state = lambda: Resume(tmp_path / "state.pt", {}, every=0)

    def kill(step, losses, modules):
        if step == at:
            raise Killed

    with pytest.raises(Killed):
        repair(*problem(), "deep", **options, resume=state(), on_step=kill)
    steps = []
    result = repair(*problem(), "deep", **options, resume=state(), on_step=lambda step, *_: steps.append(step))
    whole = repair(*problem(), "deep", **options)
    assert steps == list(range(at + 1, 5 if fit == "joint" else 5 * 4 * 2))
    assert torch.equal(result.losses, whole.losses)
    assert result.active == whole.active
    for one, other in zip(result.model.repairs, whole.model.repairs, strict=True):
        assert torch.equal(one.up, other.up)
        assert torch.equal(one.down, other.down)


def test_the_expert_runs_once_for_each_input_and_targets_are_kept(tmp_path):
    module, experts, inputs = problem()
    options = {"steps": 12, "batch_size": 8, "forward": embeds, "cache": tmp_path}
    passes = [repair(module, experts, inputs, "deep", rank=rank, **options).passes for rank in (2, 3)]
    assert [p.experts for p in passes] == [40, 0]
    assert [p.merged for p in passes] == [2 * (12 + 1) * 8] * 2, "the first batch is looked at to choose the variant"


@pytest.mark.parametrize("fit", ["joint", "layerwise"])
def test_the_variant_is_chosen_for_each_layer_from_its_tokens(tmp_path, fit):
    def build(seed):
        torch.manual_seed(seed)
        block = lambda *parts: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), *parts)
        stem, tail = nn.Conv2d(3, 4, 3), (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6))
        return nn.Sequential(stem, nn.Sequential(block(nn.ReLU()), block(nn.Tanh())), *tail).double()

    experts = {f"t{i}": build(i + 1) for i in range(2)}
    inputs = {task: torch.randn(20, 3, 8, 8, dtype=torch.float64) for task in experts}
    options = {"steps": 30, "lr": 0.01, "rank": 4, "fit": fit, "blocks": ["1.0", "1.1"]}
    result = repair(build(0), experts, inputs, "deep", **options)
    variants = {layer: modules.variant for layer, modules in result.model.repair_at.items()}
    assert variants == {"1.0": "centred", "1.1": "standard", FINAL: "standard"}
    assert result.warnings[0] == "variant=centred at 1.0, because 100% of the features are ≥ 0."
    assert result.model.repair_at["1.0"].mean.abs().min() > 0
    result.model.save(tmp_path / "modules.safetensors")
    loaded = SurgeryModel.load(tmp_path / "modules.safetensors", build(0))
    assert torch.equal(loaded(inputs["t1"], "t1"), result.model(inputs["t1"], "t1"))


@pytest.mark.parametrize("fit", ["joint", "layerwise"])
def test_the_default_equals_the_standard_variant_where_tokens_have_both_signs(fit):
    options = {"steps": 5, "rank": 3, "fit": fit, "forward": embeds}
    auto, standard = (repair(*problem(), "deep", **options, **more) for more in ({}, {"variant": "standard"}))
    for one, other in zip(auto.model.repairs.parameters(), standard.model.repairs.parameters(), strict=True):
        assert torch.equal(one, other)


def test_one_pass_for_all_tasks_and_the_shared_optimizer():
    options = {"steps": 6, "lr": 0.01, "rank": 3, "forward": embeds}
    one, two = (repair(*problem(), "deep", concatenate=c, **options) for c in (True, False))
    torch.testing.assert_close(one.losses, two.losses, rtol=0, atol=1e-12)
    shared = repair(*problem(), "deep", optimizer="shared_adam", **options)
    torch.testing.assert_close(shared.losses[0], one.losses[0])
    assert not torch.allclose(shared.losses[-1], one.losses[-1])
    with pytest.raises(ConfigError, match="one Adam for each task and layer"):
        repair(*problem(), "deep", optimizer="shared_adam", fit="layerwise", **options)
