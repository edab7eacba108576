"""AdaMerging's drop-in classes: the user's hooks, the textbook merged models, and CLIP pools."""

import pytest
import torch
from adaptation_problem import problem
from desk import Desk
from torch import nn

import suture
from suture.adaptation import adapt, entropy
from suture.errors import ConfigError, DataError, IncompatibleModels


def modules(tasks=2):
    """A pool of modules, and endless batches of each task."""
    module, _, models, batches = problem(tasks=tasks)
    pool = {"_pretrained_": module}
    for name, state in models.items():
        pool[name] = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
        pool[name].load_state_dict(state)
    return pool, models, batches


def subclass(kind, batches):
    class Mine(kind):
        started = 0

        def on_test_time_adaptation_start(self):
            self.started += 1

        def get_shuffled_test_loader_iter(self, task):
            assert self.started == 1
            return iter(suture.InfiniteDataLoader(batches[task]))

        def compute_logits(self, module, batch, task):
            assert task in batches
            return 2 * module(batch)

    return Mine


@pytest.mark.parametrize(
    ("kind", "granularity"),
    [(suture.TaskWiseAdaMergingAlgorithm, "task"), (suture.LayerWiseAdaMergingAlgorithm, "layer")],
)
def test_the_hooks_say_what_is_learned_from(kind, granularity, tmp_path):
    pool, models, batches = modules()
    before = {name: {k: v.clone() for k, v in module.state_dict().items()} for name, module in pool.items()}
    algorithm = subclass(kind, batches)(max_steps=5, lr=0.1, save_merging_weights=tmp_path / "found.pt")
    merged = algorithm.run(pool)
    plain = adapt(
        pool["_pretrained_"],
        before["_pretrained_"],
        models,
        batches,
        lambda module, batch, task: 2 * module(batch),
        granularity=granularity,
        max_steps=5,
        lr=0.1,
    )
    assert torch.equal(algorithm.result.history, plain.history)
    assert all(torch.equal(tensor, plain.merged[name]) for name, tensor in merged.state_dict().items())
    assert all(torch.equal(v, before[name][k]) for name, module in pool.items() for k, v in module.state_dict().items())
    again = subclass(kind, {})(weights=tmp_path / "found.pt").run(pool)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in merged.state_dict().items())


def test_a_class_without_its_hook_and_unknown_knobs_are_refused():
    with pytest.raises(NotImplementedError, match="get_shuffled_test_loader_iter says where inputs come from"):
        suture.LayerWiseAdaMergingAlgorithm(max_steps=1).run(modules()[0])
    with pytest.raises(ConfigError, match="Did you mean 'max_steps'"):
        suture.LayerWiseAdaMergingAlgorithm(max_step=1)
    with pytest.raises(ConfigError, match="no '_pretrained_'"):
        suture.TaskWiseAdaMergingAlgorithm().run({"a": nn.Linear(2, 2)})


@pytest.mark.parametrize("granularity", ["task", "layer"])
@pytest.mark.parametrize("clamp", [True, False])
def test_autograd_through_the_merged_model_finds_the_same_coefficients(granularity, clamp):
    pool, models, batches = modules()
    base = pool["_pretrained_"]
    tuned = [module for name, module in pool.items() if name != "_pretrained_"]
    if granularity == "task":
        merged = suture.TaskWiseMergedModel(suture.get_task_wise_weights(2, 0.3), base, tuned, clamp_weights=clamp)
    else:
        weight = suture.get_layer_wise_weights(2, 4, 0.3)
        merged = suture.LayerWiseMergedModel(weight, base, tuned, clamp_weights=clamp)
    optimizer = torch.optim.Adam([merged.merge_weight], lr=0.1)
    for step in range(4):
        merged.merge_weights()
        loss = torch.stack([entropy(merged(batches[task][step % 2])) for task in models]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    options = {"granularity": granularity, "clamp_weights": clamp, "max_steps": 4, "lr": 0.1}
    found = adapt(base, base, models, batches, **options)
    torch.testing.assert_close(merged.merge_weight.detach().double(), found.history[-1], rtol=0, atol=1e-4)
    for name, tensor in merged.merge_and_unload().state_dict().items():
        torch.testing.assert_close(tensor, found.merged[name], rtol=0, atol=1e-4)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.embed(tokens))


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("kind", [suture.TaskWiseMergedModel, suture.LayerWiseMergedModel])
def test_a_call_and_the_unloaded_model_agree_on_tied_weights(kind, tie_weights):
    torch.manual_seed(0)
    base, *tuned = (Tied() for _ in range(3))
    shape = (2,) if kind is suture.TaskWiseMergedModel else (2, 1)
    merged = kind(torch.full(shape, 0.3), base, tuned, tie_weights=tie_weights)
    tokens, unloaded = torch.arange(5), merged.merge_and_unload()
    assert torch.equal(merged(tokens), unloaded(tokens))
    expected = base.embed.weight + 0.3 * sum(model.embed.weight - base.embed.weight for model in tuned)
    torch.testing.assert_close(unloaded.head.weight, expected)
    tuned[1].head.weight = nn.Parameter(torch.zeros(5, 4))
    with pytest.raises(IncompatibleModels, match=r"'head\.weight' is tied to 'embed\.weight' .* fine-tuned model 1"):
        kind(torch.full(shape, 0.3), base, tuned)


def frozen_pool():
    torch.manual_seed(0)
    build = lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)).eval()
    pool = {name: build() for name in ("_pretrained_", "t0", "t1")}
    for value, module in enumerate(pool.values()):
        module[1].running_mean.fill_(value)
        module[0].bias.requires_grad_(False)
    return pool


@pytest.mark.parametrize("kind", [suture.TaskWiseAdaMergingAlgorithm, suture.LayerWiseAdaMergingAlgorithm])
def test_frozen_parameters_and_running_statistics_stay_at_the_base_as_in_fusion_bench(kind):
    _, _, batches = modules()
    pool = frozen_pool()
    base = pool["_pretrained_"].state_dict()
    algorithm = subclass(kind, batches)(max_steps=3, lr=0.1)
    merged = algorithm.run(pool).state_dict()
    same = {name for name in base if torch.equal(merged[name], base[name])}
    frozen = {"0.bias", "1.running_mean", "1.running_var"}
    # the affine parameters of both models are those of the base
    assert same == frozen | {"1.num_batches_tracked", "1.weight", "1.bias"}
    if algorithm.granularity == "layer":
        assert frozen.isdisjoint(algorithm.result.coefficients.layers)
        textbook = suture.LayerWiseMergedModel(algorithm.result.coefficients.values.float(), *parts(pool))
        expected = textbook.merge_and_unload().state_dict()
        assert all(torch.allclose(merged[name], expected[name], atol=1e-6) for name in base)


def parts(pool):
    return pool["_pretrained_"], [module for name, module in pool.items() if name != "_pretrained_"], False


def test_frozen_parameters_can_be_merged_like_the_others():
    _, _, batches = modules()
    merged = subclass(suture.LayerWiseAdaMergingAlgorithm, batches)(max_steps=1, frozen_parameters="merge")
    assert merged.run(frozen_pool())[1].running_mean.unique().numel() == 1
    assert "1.running_mean" in merged.result.coefficients.layers
    pool = frozen_pool()
    pool["_pretrained_"].requires_grad_(False)
    with pytest.raises(ConfigError, match=r"nothing would be merged\. Remedy: .*frozen_parameters='merge'"):
        subclass(suture.LayerWiseAdaMergingAlgorithm, batches)(max_steps=1).run(pool)
    with pytest.raises(ConfigError, match="frozen_parameters='leave': wanted 'base' or 'merge'"):
        subclass(suture.LayerWiseAdaMergingAlgorithm, batches)(frozen_parameters="leave").run(pool)


def test_coefficients_of_another_shape_are_refused_by_the_merged_models():
    pool, _, _ = modules()
    tuned = [pool["t0"], pool["t1"]]
    with pytest.raises(ConfigError, match=r"have shape \(3,\); wanted \(2,\)"):
        suture.TaskWiseMergedModel(suture.get_task_wise_weights(3), pool["_pretrained_"], tuned)
    with pytest.raises(ConfigError, match=r"have shape \(2, 3\); wanted \(2, 4\)"):
        suture.LayerWiseMergedModel(suture.get_layer_wise_weights(2, 3), pool["_pretrained_"], tuned)


def test_starting_weights_share_one_out_where_no_value_is_given():
    assert suture.get_task_wise_weights(4).tolist() == [0.25] * 4
    assert suture.get_layer_wise_weights(2, 3, 0.5).tolist() == [[0.5] * 3] * 2


def test_a_loader_without_batches_ends_instead_of_spinning():
    with pytest.raises(DataError, match="gives no batch"):
        next(iter(suture.InfiniteDataLoader([])))


def test_the_entropy_of_fusion_bench_has_its_name():
    logits = torch.tensor([[5.0, -5.0, 0.0]])
    p = logits.softmax(-1)
    torch.testing.assert_close(suture.entropy_loss(logits), -(p * torch.log(p + 1e-8)).sum())


@pytest.mark.parametrize(
    ("kind", "shape"),
    [(suture.CLIPTaskWiseAdaMergingAlgorithm, (2,)), (suture.CLIPLayerWiseAdaMergingAlgorithm, (2, 39))],
)
def test_pools_of_clip_models_are_adapted_in_one_call(shop, tmp_path, monkeypatch, kind, shape):
    monkeypatch.chdir(tmp_path)
    desk = Desk(shop, tmp_path)
    algorithm = kind(max_steps=2, batch_size=4)
    encoder = algorithm.run({"family": "clip", "models": desk.models}, {"tasks": desk.tasks})
    assert algorithm.result.coefficients.values.shape == shape
    assert encoder(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)).shape == (1, 8)
    with pytest.raises(ConfigError, match="Did you mean 'max_steps'"):
        kind(max_step=2)
