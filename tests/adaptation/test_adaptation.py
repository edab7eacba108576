"""AdaMerging: parity with the published trajectories, and the laws of the loop."""

from contextlib import nullcontext
from functools import partial

import golden_cases as golden
import pytest
import torch
from adaptation_problem import network, problem
from torch import nn
from torch.nn.functional import normalize

from suture import merge
from suture.adaptation import adapt, merged_model
from suture.adaptation import entropy as entropy_of
from suture.adaptation import vectors as rows
from suture.errors import ConfigError, DataError, IncompatibleModels

OBJECTIVE = {"log_softmax": "entropy", "log(p+1e-8)": "entropy_epsilon"}
GROUPED = {"first": r"^0\.", "last": r"^2\."}


class Reference(nn.Module):
    """The network of the reference vectors."""

    def __init__(self):
        super().__init__()
        self.a, self.n, self.b = nn.Linear(10, 14), nn.LayerNorm(14), nn.Linear(14, 8, bias=False)

    def forward(self, x):
        return self.b(self.n(self.a(x).tanh()))


@pytest.mark.parametrize("concatenate", [True, False])
@pytest.mark.parametrize("name", golden.names("adamerging"))
def test_the_trajectory_equals_the_reference(name, concatenate):
    case, base, models, tensors = golden.load(name)
    scale = case["logit_scale"]
    head = lambda weight: lambda features: scale * normalize(features, dim=-1) @ weight.T
    result = adapt(
        Reference().double(),
        base,
        models,
        {f"model_{t}": list(tensors["inputs"][:, t]) for t in range(len(models))},
        {f"model_{t}": head(tensors[f"head_{t}"]) for t in range(len(models))},
        granularity=case["granularity"],
        objective=OBJECTIVE[case["entropy"]],
        lr=case["lr"],
        clamp_weights=case["clamp"],
        max_steps=case["steps"],
        concatenate=concatenate,
    )
    torch.testing.assert_close(result.history, tensors["coefficients"], rtol=0, atol=1e-9)
    torch.testing.assert_close(result.losses, tensors["losses"], rtol=0, atol=1e-9)
    assert result.coefficients.layers == (tuple(case["parameter_order"]) if case["granularity"] == "layer" else None)


def textbook(module, base, models, batches, spread, values, steps, lr):
    """The merge in the graph, and autograd through it."""
    optimizer, values = None, values.clone().requires_grad_()
    optimizer = torch.optim.Adam([values], lr=lr)
    for step in range(steps):
        weights = spread(values)
        merged = {
            name: base[name]
            + sum(weights[t, i] * (model[name] - base[name]) for t, model in enumerate(models.values()))
            for i, name in enumerate(base)
        }
        outputs = [torch.func.functional_call(module, merged, batches[task][step % 2]) for task in models]
        loss = torch.stack([entropy_of(output) for output in outputs]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return values.detach()


SPREADS = {
    "task": ((3,), lambda v: v[:, None].expand(3, 4)),
    "layer": ((3, 4), lambda v: v),
    "group": ((3, 2), lambda v: v[:, [0, 0, 1, 1]]),
}


@pytest.mark.parametrize(
    "transform", [{}, {"clamp_weights": True}, {"softmax": True}], ids=["plain", "clamp", "softmax"]
)
@pytest.mark.parametrize("granularity", SPREADS)
def test_the_coefficients_equal_a_plain_autograd_loop(granularity, transform):
    module, base, models, batches = problem(torch.float64)
    shape, spread = SPREADS[granularity]
    change = {"clamp_weights": lambda v: v.clamp(0, 1), "softmax": lambda v: v.softmax(0)}
    change = change[next(iter(transform))] if transform else lambda v: v
    start = torch.full(shape, 0.3, dtype=torch.float64)
    expected = textbook(module, base, models, batches, lambda v: spread(change(v)), start, 6, 0.3)
    wanted = GROUPED if granularity == "group" else granularity
    result = adapt(module, base, models, batches, granularity=wanted, max_steps=6, lr=0.3, **transform)
    torch.testing.assert_close(result.history[-1], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(result.coefficients.values, change(expected), rtol=0, atol=1e-12)


def test_the_merged_weights_are_the_base_and_the_weighted_task_vectors():
    module, base, models, batches = problem(torch.float64)
    result = adapt(module, base, models, batches, max_steps=4, lr=0.1)
    for i, name in enumerate(result.coefficients.layers):
        weights = result.coefficients.values[:, i]
        wanted = base[name] + sum(w * (m[name] - base[name]) for w, m in zip(weights, models.values(), strict=True))
        torch.testing.assert_close(result.merged[name], wanted, rtol=0, atol=1e-14)


def test_the_caller_s_module_weights_heads_and_gradients_are_left_alone():
    module, base, models, batches = problem()
    heads = nn.ModuleDict({task: nn.Linear(4, 3) for task in models})
    held = {"module": module.state_dict(), "base": base, "heads": heads.state_dict(), **models, "batches": {}}
    before = {key: {name: tensor.clone() for name, tensor in state.items()} for key, state in held.items()}
    adapt(module.train(), base, models, batches, heads, max_steps=3, lr=0.1)
    for key, state in held.items():
        assert all(torch.equal(tensor, before[key][name]) for name, tensor in state.items()), key
    assert all(p.grad is None and p.requires_grad for p in [*module.parameters(), *heads.parameters()])
    assert not any(p._post_accumulate_grad_hooks for p in module.parameters())
    assert module.training


def test_the_same_inputs_give_the_same_bits():
    one, two = (adapt(*problem(), max_steps=5, lr=0.1) for _ in range(2))
    assert torch.equal(one.history, two.history)
    assert all(torch.equal(one.merged[name], two.merged[name]) for name in one.merged)


def test_the_same_torch_seed_gives_the_same_bits_with_dropout():
    def run():
        build = lambda: nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 4))
        module, *rest = problem(build=build)
        return adapt(module.train(), *rest, max_steps=5, lr=0.1).history

    assert torch.equal(run(), run())


def test_a_clamped_coefficient_has_no_gradient_outside():
    module, base, models, batches = problem(torch.float64)
    start = torch.full((3, 4), 0.5, dtype=torch.float64)
    start[0], start[1] = -0.2, 1.3
    result = adapt(module, base, models, batches, init_values=start, clamp_weights=True, max_steps=3, lr=0.01)
    assert torch.equal(result.history[-1][:2], start[:2])
    assert (result.history[-1][2] != 0.5).all()
    assert torch.equal(result.coefficients.values[:2], start[:2].clamp(0, 1))


def test_softmax_coefficients_sum_to_one_over_tasks():
    values = adapt(*problem(), granularity="task", softmax=True, max_steps=3, lr=0.5).coefficients.values
    torch.testing.assert_close(values.sum(), torch.tensor(1.0, dtype=torch.float64))


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    )


@pytest.mark.parametrize("tasks", [1, 2, 5, 8])
@pytest.mark.parametrize("build", [network, convolutional])
def test_plus_plus_starts_at_ties_exactly(build, tasks):
    module, base, models, _ = problem(build=build, tasks=tasks)
    merged = adapt(module, base, models, {}, plus_plus=True, max_steps=0).merged
    expected = merge(base, models, "ties_merging")
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_plus_plus_settles_cancelled_columns_by_the_majority_of_the_whole_model():
    module = network()
    base = {name: torch.zeros_like(w) for name, w in module.state_dict().items()}
    up, down = ({name: torch.ones_like(w) for name, w in base.items()} for _ in range(2))
    down["0.bias"] = -down["0.bias"]
    merged = adapt(module, base, {"up": up, "down": down}, {}, plus_plus=True, threshold=100, max_steps=0).merged
    expected = merge(base, [up, down], "ties_merging", threshold=100)
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    assert merged["0.bias"][0] == torch.tensor(0.3)


def test_plus_plus_trims_over_what_is_not_frozen_as_ties_does():
    module, base, models, _ = problem()
    merged = adapt(module, base, models, {}, frozen=["0.weight"], plus_plus=True, max_steps=0).merged
    expected = merge(base, models, "ties_merging", remove_keys=["0.weight"])
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_without_plus_plus_it_starts_at_task_arithmetic():
    module, base, models, _ = problem(tasks=8)
    merged = adapt(module, base, models, {}, max_steps=0).merged
    expected = merge(base, models, "task_arithmetic")
    for name in expected:
        torch.testing.assert_close(merged[name], expected[name], rtol=0, atol=1e-6)


def test_plus_plus_lowers_the_objective():
    losses = adapt(*problem(), plus_plus=True, threshold=50, max_steps=20, lr=0.05).losses
    assert losses[-2:].sum() < losses[:2].sum()


def test_integer_and_bool_buffers_stay_the_base_s():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 4)
            self.register_buffer("positions", torch.arange(4))
            self.register_buffer("mask", torch.tensor([True, False]))

        def forward(self, x):
            return self.linear(x) + self.positions

    module, base, models, batches = problem(build=lambda: nn.Sequential(Counting(), nn.BatchNorm1d(4)))
    base["1.num_batches_tracked"] = torch.tensor(7)
    for model in models.values():
        model["0.mask"] = ~base["0.mask"]
    merged = adapt(module.train(), base, models, batches, max_steps=2).merged
    for name in ("0.positions", "0.mask", "1.num_batches_tracked"):
        assert torch.equal(merged[name], base[name])
        assert merged[name].dtype == base[name].dtype


@pytest.mark.parametrize("training", [True, False])
def test_a_convolutional_network_with_batch_norm_is_adapted(training):
    module, base, models, batches = problem(build=convolutional, shape=(3, 6, 6))
    result = adapt(module.train(training), base, models, batches, max_steps=8, lr=0.1)
    assert result.losses[-1] < result.losses[0]
    running = result.coefficients.layers.index("1.running_mean")
    assert (result.history[:, :, running] == 0.3).all(), "a buffer has no gradient and keeps its coefficient"
    with pytest.raises(ConfigError) if training else nullcontext():
        adapt(module, base, models, batches, max_steps=1, concatenate=True)


def test_one_pass_for_all_tasks_equals_task_by_task():
    module, base, models, batches = problem(torch.float64, build=convolutional, shape=(3, 6, 6))
    one, two = (adapt(module, base, models, batches, max_steps=6, lr=0.1, concatenate=c) for c in (True, False))
    torch.testing.assert_close(one.history, two.history, rtol=0, atol=1e-12)


@pytest.fixture
def bert():
    from transformers import BertConfig, BertForSequenceClassification

    def build():
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
        return BertForSequenceClassification(BertConfig(vocab_size=40, num_labels=3, **sizes))

    module, base, models, _ = problem(build=build)
    texts = lambda length: {
        "input_ids": torch.randint(0, 40, (2, length)),
        "attention_mask": torch.ones(2, length, dtype=torch.int64),
    }
    return module, base, models, texts


@pytest.mark.parametrize("lengths", [(6, 6, 6), (4, 5, 6)])
def test_a_text_classifier_is_adapted_whatever_the_lengths(bert, lengths):
    module, base, models, texts = bert
    batches = {task: [texts(length)] for task, length in zip(models, lengths, strict=True)}
    result = adapt(module, base, models, batches, granularity="block", max_steps=10, lr=0.05)
    assert result.losses[-1] < result.losses[0]
    assert "bert.encoder.layer.1" in result.coefficients.layers
    module.load_state_dict(result.merged)


@pytest.mark.parametrize("objective", ["expert_cross_entropy", "expert_feature_l1"])
@pytest.mark.parametrize("concatenate", [True, False])
def test_the_expert_is_the_goal_of_the_expert_objectives(objective, concatenate):
    module, base, models, batches = problem(tasks=1)
    options = {"objective": objective, "granularity": "task", "concatenate": concatenate}
    at_expert = adapt(module, base, models, batches, init_values=1.0, max_steps=1, **options)
    result = adapt(module, base, models, batches, max_steps=60, lr=0.05, **options)
    assert result.losses[-1] < result.losses[0]
    if objective == "expert_feature_l1":
        assert at_expert.losses[0] < 1e-6
        assert result.coefficients.values.item() == pytest.approx(1.0, abs=0.1)


def test_the_experts_are_the_models_themselves_also_with_plus_plus():
    module, base, models, batches = problem()
    result = adapt(module, base, models, batches, objective="expert_feature_l1", plus_plus=True, max_steps=1)
    module.load_state_dict(result_start := merge(base, models, "ties_merging"))
    expected = 0.0
    for task, model in models.items():
        expert = network()
        expert.load_state_dict(model)
        expected += (module(batches[task][0]) - expert(batches[task][0])).abs().mean().item()
    assert result_start.keys() == result.merged.keys()
    assert result.losses[0].item() == pytest.approx(expected, rel=1e-5)


def test_logits_may_be_a_function_of_module_inputs_and_task():
    module, base, models, batches = problem(torch.float64)
    heads = {task: partial(torch.mul, float(i + 1)) for i, task in enumerate(models)}
    function = lambda module, inputs, task: heads[task](module(inputs))
    by_head, by_function = (adapt(module, base, models, batches, how, max_steps=4) for how in (heads, function))
    torch.testing.assert_close(by_head.history, by_function.history, rtol=0, atol=1e-12)
    with pytest.raises(ConfigError, match="function of one task"):
        adapt(module, base, models, batches, function, max_steps=4, concatenate=True)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_every_optimizer_lowers_the_objective(optimizer):
    losses = adapt(*problem(), optimizer=optimizer, max_steps=20, lr=0.05).losses
    assert losses[-2:].sum() < losses[:2].sum()


def test_task_vectors_may_be_held_in_a_smaller_dtype():
    exact, small = (adapt(*problem(), max_steps=10, lr=0.02, vectors_dtype=d) for d in (None, torch.bfloat16))
    torch.testing.assert_close(small.history, exact.history, rtol=0, atol=0.02)
    assert small.merged["0.weight"].dtype == torch.float32


def test_inner_products_with_a_smaller_dtype_do_not_depend_on_the_slices(monkeypatch):
    vectors, gradient = torch.randn(3, 50).bfloat16(), torch.randn(5, 10)
    monkeypatch.setitem(rows._CHUNK, "cpu", 7)
    found = rows.inner_products(vectors, gradient)
    torch.testing.assert_close(found, vectors.float() @ gradient.reshape(-1))


def test_a_half_precision_model_is_adapted_and_keeps_its_dtype():
    result = adapt(*problem(torch.bfloat16), max_steps=10, lr=0.05)
    assert result.losses[-2:].sum() < result.losses[:2].sum()
    assert all(tensor.dtype == torch.bfloat16 for tensor in result.merged.values())


def test_tied_weights_share_a_coefficient_and_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
            self.down.weight = self.up.weight

        def forward(self, x):
            return self.down(self.up(x).tanh())

    torch.manual_seed(0)
    module, tuned = Tied().eval(), Tied()
    result = adapt(module, module, {"t": tuned}, {"t": [torch.randn(4, 6)]}, max_steps=3)
    assert result.coefficients.layers == ("down.weight",)
    assert result.merged["up.weight"] is result.merged["down.weight"]


def test_a_tied_name_that_the_files_leave_out_is_merged_all_the_same():
    module, base, models, batches = problem(build=lambda: nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)))
    module[1].weight = module[0].weight
    for state in (base, *models.values()):
        del state["0.weight"]
    result = adapt(module, base, models, batches, max_steps=3, lr=0.1)
    assert set(result.coefficients.layers) == {"0.bias", "1.weight", "1.bias"}
    assert (result.history[-1] != 0.3).all()


def test_a_head_that_the_checkpoints_lack_stays_as_it_is_in_the_module():
    module, base, models, batches = problem(torch.float64)
    head = nn.Linear(4, 3, dtype=torch.float64)
    inside = adapt(nn.Sequential(*module, head), base, models, batches, max_steps=4)
    outside = adapt(module, base, models, batches, dict.fromkeys(models, head), max_steps=4)
    torch.testing.assert_close(inside.history, outside.history, rtol=0, atol=1e-12)
    assert inside.merged.keys() == base.keys()


def test_names_tied_in_the_base_must_be_tied_in_the_module():
    module, base, models, batches = problem(build=lambda: nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)))
    for state in (base, *models.values()):
        state["1.weight"] = state["0.weight"]
    with pytest.raises(IncompatibleModels, match=r"tied to '0.weight' in the base but not in the module"):
        adapt(module, base, models, batches)


@pytest.mark.parametrize("concatenate", [True, False])
def test_gradients_are_freed_as_soon_as_they_are_ready(concatenate, monkeypatch):
    alive, take = [], merged_model.MergedModel._take

    def counting(self, i, parameter):
        take(self, i, parameter)
        alive.append(sum(target.grad is not None for target in self.targets))

    monkeypatch.setattr(merged_model.MergedModel, "_take", counting)
    adapt(*problem(tasks=1), max_steps=2, concatenate=concatenate)
    assert alive == [0] * 8


def test_frozen_tensors_stay_at_the_base():
    module, base, models, batches = problem()
    result = adapt(module, base, models, batches, frozen=["2.weight", "2.bias"], max_steps=3)
    assert result.coefficients.layers == ("0.weight", "0.bias")
    assert torch.equal(result.merged["2.weight"], base["2.weight"])


def test_every_step_is_shown_to_the_caller():
    seen = []
    result = adapt(*problem(), max_steps=3, on_step=lambda step, loss, values: seen.append((step, loss, values)))
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert [loss for _, loss, _ in seen] == result.losses.tolist()
    assert torch.equal(seen[-1][2], result.history[-1])


def test_adaptation_works_where_gradients_are_off():
    module, base, models, batches = problem()
    with torch.no_grad():
        assert adapt(module, base, models, batches, max_steps=2, lr=0.1).history.unique().numel() > 1


def test_a_layer_that_only_the_first_task_uses_gets_its_gradient():
    module, base, models, batches = problem(torch.float64)
    skips = lambda module, inputs, task: module(inputs) if task == "t0" else module[2](inputs[:, :5])
    history = adapt(module, base, models, batches, skips, max_steps=2, lr=0.1).history
    assert (history[-1][:, 0] != 0.3).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "layers"}, "Unknown granularity 'layers'. Did you mean 'layer'"),
        ({"granularity": ["nowhere"]}, "'nowhere' is in no tensor's name"),
        ({"granularity": ["("]}, "not a regular expression"),
        ({"objective": "entropi"}, "Unknown objective"),
        ({"optimizer": "lion"}, "Unknown optimizer"),
        ({"lr": 0.0}, "wanted a positive lr"),
        ({"max_steps": -1}, "max_steps=-1"),
        ({"clamp_weights": True, "softmax": True}, "both given"),
        ({"init_values": [0.1, 0.2]}, r"shape \(2,\)"),
        ({"init_values": float("nan")}, "init_values=nan"),
        ({"threshold": 0, "plus_plus": True}, "threshold"),
        ({"batches": {"t0": []}}, "batches lacks 't1'"),
        ({"batches": {"t0": [], "t1": [], "t2": [], "t3": []}}, "batches has something for 't3'"),
        ({"logits": {}}, "logits lacks 't0'"),
        ({"frozen": ["0.weight", "0.bias", "2.weight", "2.bias"]}, "nothing to merge"),
    ],
)
def test_a_bad_option_is_refused_in_one_line(options, message):
    module, base, models, batches = problem()
    options = {"batches": batches, **options}
    with pytest.raises(ConfigError, match=message) as refused:
        adapt(module, base, models, **options)
    assert "\n" not in str(refused.value)


def test_inputs_that_run_out_are_refused():
    module, base, models, batches = problem()
    with pytest.raises(DataError, match="'t0' ran out"):
        adapt(module, base, models, {task: iter(batch) for task, batch in batches.items()}, max_steps=3)


def test_an_objective_that_is_not_finite_is_refused():
    module, base, models, batches = problem()
    batches["t1"][1][0] = float("nan")
    with pytest.raises(DataError, match="nan at step 1"):
        adapt(module, base, models, batches, max_steps=3)


def test_weights_that_do_not_fit_the_module_are_refused():
    _, base, models, batches = problem()
    with pytest.raises(IncompatibleModels, match=r"'2.bias' is in the base but not in the module"):
        adapt(nn.Sequential(nn.Linear(6, 5)), base, models, batches)
    with pytest.raises(IncompatibleModels, match=r"has shape \(4, 6\) in the module"):
        adapt(nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(5, 4)), base, models, batches)
    module = network()
    module.register_buffer("positions", torch.arange(4))
    with pytest.raises(IncompatibleModels, match=r"'positions' has shape \(4,\) in the module but \(5,\)"):
        adapt(module, base | {"positions": torch.arange(5)}, models, batches)


def test_weights_that_are_not_finite_are_refused():
    module, base, models, batches = problem()
    models["t1"]["0.bias"][1] = float("inf")
    with pytest.raises(IncompatibleModels, match=r"'0.bias' is not finite in 't1'"):
        adapt(module, base, models, batches)


def test_a_result_that_is_too_large_for_its_dtype_is_refused():
    module, base, models, batches = problem(dtype=torch.float16)
    models = {task: {name: torch.full_like(w, 6e4) for name, w in base.items()} for task in models}
    with pytest.raises(IncompatibleModels, match=r"'0\.weight' would not be finite at entry 0 as float16"):
        adapt(module, base, models, batches, init_values=1.0, max_steps=0)


def test_a_module_that_gives_no_tensor_is_refused():
    class Pair(nn.Linear):
        def forward(self, x):
            return x, x

    module, *rest = problem(build=lambda: Pair(6, 4))
    with pytest.raises(ConfigError, match="gives a tuple"):
        adapt(module, *rest)


def test_a_batch_with_labels_needs_a_forward_that_takes_the_inputs():
    module, base, models, batches = problem()
    labelled = {task: [(batch, torch.zeros(3)) for batch in found] for task, found in batches.items()}
    with pytest.raises(ConfigError, match="A batch is a tuple"):
        adapt(module, base, models, labelled)
    plain = adapt(module, base, models, batches, max_steps=3)
    by_forward = adapt(module, base, models, labelled, forward=lambda module, batch: module(batch[0]), max_steps=3)
    assert torch.equal(plain.history, by_forward.history)
