"""Distillation: hand-worked steps, what it may change, resuming, architectures, files that load without suture."""

import copy
import math

import pytest
import torch
from torch import nn

from suture.core.batches import ShuffledBatches
from suture.errors import ConfigError, DataError, IncompatibleModels
from suture.repairs import StaticModel, repair
from suture.repairs.training import one_cycle
from suture.storage.resume import Resume


def network(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 10), nn.LayerNorm(10), nn.Tanh(), nn.Dropout(0.5), nn.Linear(10, 8), nn.Linear(8, 5)
    ).to(dtype)


def problem(tasks=3, sizes=(40, 30, 50), dtype=torch.float64):
    module = network(dtype=dtype)
    experts = {f"t{i}": network(i + 1, dtype) for i in range(tasks)}
    inputs = {task: torch.randn(n, 6, dtype=dtype) for task, n in zip(experts, sizes, strict=False)}
    return module, experts, inputs


def states(*modules):
    return [{name: tensor.clone() for name, tensor in module.state_dict().items()} for module in modules]


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_step_worked_by_hand():
    module, expert = (nn.Linear(1, 1, bias=False).double() for _ in range(2))
    nn.init.constant_(module.weight, 2.0)
    nn.init.constant_(expert.weight, 5.0)
    inputs = {"t": torch.full((4, 1), 3.0, dtype=torch.float64)}
    one = repair(module, {"t": expert}, inputs, "distil", steps=2, lr=0.1, optimizer="sgd", schedule="constant")
    # |3w − 15| has the slope −3 below w = 5: 2 → 2.3 → 2.6
    assert one.losses.flatten().tolist() == pytest.approx([9.0, 8.1])
    assert one.tensors["weight"].item() == pytest.approx(2.6)
    square = repair(
        module, {"t": expert}, inputs, "distil", steps=1, lr=0.1, optimizer="sgd", schedule="constant", loss="mse"
    )
    # (3w − 15)² has the slope 6(3w − 15) = −54
    assert square.tensors["weight"].item() == pytest.approx(2 + 0.1 * 54)


def textbook(module, experts, inputs, *, steps, lr, batch_size, seed, weight_decay):
    """Experts in the loop, one task after another, one optimizer over the module's parameters."""
    student = copy.deepcopy(module).eval()
    streams = {task: ShuffledBatches(x, batch_size, seed=seed, name=task) for task, x in inputs.items()}
    adam = torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=weight_decay)
    losses = torch.zeros(steps, len(inputs), dtype=torch.float64)
    for step in range(steps):
        adam.zero_grad()
        for t, (task, stream) in enumerate(streams.items()):
            with torch.no_grad():
                goal = experts[task].eval()(stream[step])
            loss = (student(stream[step]) - goal).abs().mean()
            loss.backward()
            losses[step, t] = loss.item()
        adam.param_groups[0]["lr"] = lr * one_cycle(step, steps)
        adam.step()
    return student, losses


@pytest.mark.parametrize("concatenate", [True, False])
def test_it_equals_the_loop_with_the_experts_in_it(concatenate):
    options = {"steps": 12, "lr": 0.01, "batch_size": 8, "seed": 4, "weight_decay": 0.1}
    student, losses = textbook(*problem(), **options)
    result = repair(*problem(), "distil", **options, concatenate=concatenate, encode_batch=7)
    torch.testing.assert_close(result.losses, losses, rtol=0, atol=1e-12)
    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(result.tensors[name], tensor, rtol=0, atol=1e-11)


def test_the_learning_rate_goes_up_and_down_once_and_is_never_negative():
    for steps in (1, 2, 3, 10, 400):
        rates = [one_cycle(step, steps) for step in range(steps)]
        assert all(0 < rate <= 1 for rate in rates)
        top = rates.index(max(rates))
        assert rates[: top + 1] == sorted(rates[: top + 1])
        assert rates[top:] == sorted(rates[top:], reverse=True)
    assert (rates[0], max(rates)) == (pytest.approx(1 / 25), 1)
    assert rates[-1] < 1e-4


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss": "mse"},
        {"schedule": "constant"},
        {"optimizer": "adam"},
        {"layers": "blocks", "blocks": ["0", "4"]},
        {"parameters": "lora", "rank": 3},
        {"parameters": "norms", "lr": 0.05},
        {"held_out": 0.25},
    ],
)
def test_every_option_comes_nearer_to_the_experts(options):
    result = repair(*problem(), "distil", **{"steps": 120, "lr": 0.01, **options})
    assert (result.losses[-10:].mean(0) < 0.9 * result.losses[:10].mean(0)).all()
    assert isinstance(result.model, StaticModel)
    assert (result.model.kind, result.added_parameters, result.encoders) == ("distil", 0, 1)


def changed(module, result):
    return {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, result.tensors[name])}


def test_only_the_chosen_weights_change():
    module, experts, inputs = problem()
    run = lambda **options: changed(module, repair(module, experts, inputs, "distil", steps=3, **options))
    assert run() == set(module.state_dict())
    assert run(parameters="norms") == {"1.weight", "1.bias"}
    assert run(parameters="lora", rank=2) == {"0.weight", "4.weight", "5.weight"}
    shared = {name: tensor for name, tensor in module.state_dict().items() if name.startswith("0.")}
    assert run(base=shared) == set(shared)
    assert run(base=shared, parameters="lora") == {"0.weight"}
    with pytest.raises(ConfigError, match=r"parameters=norms: the module .* has no such weights"):
        run(base=shared, parameters="norms")


def test_lora_changes_a_matrix_by_no_more_than_its_rank():
    module, experts, inputs = problem()
    result = repair(module, experts, inputs, "distil", steps=30, lr=0.01, parameters="lora", rank=2)
    for name in ("0.weight", "4.weight", "5.weight"):
        values = torch.linalg.svdvals(result.tensors[name] - module.state_dict()[name])
        assert values[1] > 1e-6
        assert values[2] < 1e-12


def test_tied_weights_stay_tied_and_are_no_targets_of_lora():
    class Tied(nn.Module):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.embedding, self.middle = nn.Embedding(7, 4), nn.Linear(4, 4)
            self.out = nn.Linear(4, 7, bias=False)
            self.out.weight = self.embedding.weight

        def forward(self, ids):
            return self.out(self.middle(self.embedding(ids).mean(1)))

    module, inputs = Tied(0), {"t": torch.randint(0, 7, (20, 3))}
    result = repair(module, {"t": Tied(1)}, inputs, "distil", steps=3, base={"out.weight": module.out.weight})
    assert changed(module, result) == {"embedding.weight", "out.weight"}
    assert torch.equal(result.tensors["embedding.weight"], result.tensors["out.weight"])
    lora = repair(module, {"t": Tied(1)}, inputs, "distil", steps=3, parameters="lora")
    assert changed(module, lora) == {"middle.weight"}


def test_the_callers_modules_and_modes_are_left_alone():
    module, experts, inputs = problem()
    models = [module, *experts.values()]
    before = states(*models)
    for parameters in ("all", "lora"):
        repair(module.train(), experts, inputs, "distil", steps=3, parameters=parameters, statistics="frozen")
    assert all(equal(*pair) for pair in zip(before, states(*models), strict=True))
    for model in models:
        assert all(part.training for part in model.modules())
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
        assert not any(part._forward_hooks for part in model.modules())
        assert type(model[0]) is nn.Linear


def test_the_experts_encode_each_input_once_and_are_not_in_the_loop(tmp_path):
    module, experts, inputs = problem()
    options = {"steps": 50, "batch_size": 8, "cache": tmp_path}
    passes = [repair(module, experts, inputs, "distil", seed=seed, **options).passes for seed in (0, 1)]
    assert [(p.merged, p.experts) for p in passes] == [(50 * 8 * 3, 120), (50 * 8 * 3, 0)]
    assert repair(module, experts, inputs, "distil", steps=2, batch_size=8).passes.experts == 3 * 16


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not():
    runs = [repair(*problem(), "distil", steps=5, parameters="lora", seed=seed).tensors for seed in (0, 0, 1)]
    assert equal(runs[0], runs[1])
    assert not equal(runs[0], runs[2])


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [0, 4, 9])
@pytest.mark.parametrize(
    "options", [{}, {"parameters": "lora"}, {"held_out": 0.3}, {"layers": "blocks", "blocks": ["0"]}, "updated"]
)
def test_a_killed_training_goes_on_to_the_same_bits(tmp_path, at, options):
    start = batch_norms if options == "updated" else problem
    options = {"statistics": "updated"} if options == "updated" else options
    options = {"steps": 10, "lr": 0.01, "batch_size": 8, **options}
    state = lambda: Resume(tmp_path / "state.pt", {}, every=0)

    def kill(step, losses, modules):
        if step == at:
            raise Killed

    with pytest.raises(Killed):
        repair(*start(), "distil", **options, resume=state(), on_step=kill)
    steps = []
    result = repair(*start(), "distil", **options, resume=state(), on_step=lambda step, *_: steps.append(step))
    whole = repair(*start(), "distil", **options)
    assert steps == list(range(at + 1, 10))
    assert torch.equal(result.losses, whole.losses)
    assert equal(result.tensors, whole.tensors)
    assert result.warnings == whole.warnings
    again = repair(*start(), "distil", **options, resume=state(), on_step=lambda *_: pytest.fail("a step"))
    assert equal(again.tensors, whole.tensors)


def batch_norms():
    def build(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5)).double()

    experts = {f"t{i}": build(i + 1) for i in range(2)}
    return build(0), experts, {task: torch.randn(30, 6, dtype=torch.float64) for task in experts}


def test_statistics_of_batch_norm_stay_unless_they_are_asked_for():
    module, experts, inputs = batch_norms()
    frozen = repair(module, experts, inputs, "distil", steps=4)
    assert changed(module, frozen) == {n for n in module.state_dict() if not n.startswith("1.") or n[2] in "wb"}
    updated = repair(module, experts, inputs, "distil", steps=4, statistics="updated", parameters="norms")
    assert {"1.running_mean", "1.running_var"} <= changed(module, updated)
    with pytest.raises(ConfigError, match="has no BatchNorm"):
        repair(*problem(), "distil", steps=4, statistics="updated")
    inputs["t1"] = torch.randn(30, 2, 6, dtype=torch.float64)
    with pytest.raises(ConfigError, match="the inputs of the tasks have different shapes"):
        repair(module, experts, inputs, "distil", steps=4, statistics="updated")


def test_held_out_inputs_choose_the_weights_and_the_result_says_so():
    module, experts, inputs = problem(1, sizes=(12,))
    options = {"steps": 20, "lr": 0.3, "schedule": "constant", "held_out": 0.5}
    result = repair(module, experts, inputs, "distil", **options)
    assert len(result.warnings) == 1
    best = int(result.warnings[0].split("after ")[1].split()[0])
    assert best < 20, "a rate this large does not end at its best"
    assert "of 20 steps: their distance on 6 held-out inputs was the smallest" in result.warnings[0]
    shorter = repair(module, experts, inputs, "distil", **{**options, "steps": best})
    assert equal(shorter.tensors, result.tensors)
    with pytest.raises(DataError, match="task 't0' has 1 inputs"):
        repair(module, experts, {"t0": inputs["t0"][:1]}, "distil", held_out=0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_trained_in_float32_and_keep_their_dtype(dtype):
    module, experts, inputs = problem(dtype=torch.float32)
    lower = copy.deepcopy(module).to(dtype)
    result = repair(
        lower, {t: e.to(dtype) for t, e in experts.items()}, _each(inputs, dtype), "distil", steps=60, lr=0.01
    )
    assert {tensor.dtype for tensor in result.tensors.values()} == {dtype}
    assert (result.losses[-5:].mean(0) < result.losses[:5].mean(0)).all()
    assert len(changed(lower, result)) == len(result.tensors)


def _each(inputs, dtype):
    return {task: rows.to(dtype) for task, rows in inputs.items()}


def test_texts_of_different_lengths_are_passed_task_by_task():
    class Bag(nn.Module):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.embedding, self.out = nn.Embedding(20, 8), nn.Linear(8, 5)

        def forward(self, input_ids, attention_mask):
            mask = attention_mask[..., None]
            return self.out((self.embedding(input_ids) * mask).sum(1) / mask.sum(1))

    inputs = {
        task: {"input_ids": torch.randint(0, 20, (12, length)), "attention_mask": torch.ones(12, length).long()}
        for task, length in (("a", 4), ("b", 7))
    }
    result = repair(Bag(0), {"a": Bag(1), "b": Bag(2)}, inputs, "distil", steps=40, lr=0.01)
    assert (result.losses[-1] < result.losses[0]).all()


def test_what_cannot_be_is_refused_in_one_line():
    module, experts, inputs = problem()
    run = lambda *a, **options: repair(*(a or (module, experts, inputs)), "distil", **{"steps": 3, **options})
    broken = {**inputs, "t1": torch.full((4, 6), math.nan, dtype=torch.float64)}
    cases = [
        (DataError, "loss is nan at step 0", lambda: run(module, experts, broken)),
        (DataError, r"loss is (inf|nan) at step 1", lambda: run(lr=1e308, optimizer="sgd", schedule="constant")),
        (ConfigError, "without a gradient", lambda: run(forward=lambda m, x: m(x).detach())),
        (ConfigError, r"repair\.lr=0", lambda: run(lr=0)),
        (ConfigError, r"repair\.held_out=1", lambda: run(held_out=1)),
        (ConfigError, r"repair\.parameters='heads'", lambda: run(parameters="heads")),
        (ConfigError, "has no block|'9'", lambda: run(layers="blocks", blocks="9")),
        (
            IncompatibleModels,
            "of width 4, the merged",
            lambda: run(module, {"t0": nn.Linear(6, 4).double()}, {"t0": inputs["t0"]}),
        ),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message) as refused:
            call()
        assert "\n" not in str(refused.value)


def test_weights_too_large_for_the_modules_dtype_are_refused():
    module, experts, inputs = problem(dtype=torch.float16)
    with pytest.raises(IncompatibleModels, match=r"would not be finite .* as float16"):
        repair(module, experts, inputs, "distil", steps=1, lr=1e6, optimizer="adam", schedule="constant")
