"""Repair of the final feature: parity with the reference vectors and the interleaved loop, caches, resuming."""

import subprocess
import sys

import golden_cases as golden
import pytest
import torch
from torch import nn

from suture.core.batches import ShuffledBatches
from suture.errors import ConfigError, DataError, IncompatibleModels
from suture.repairs import Problem, SurgeryModel, SurgeryModules, repair
from suture.repairs.fitting import Descent, constant_losses, descend
from suture.repairs.network import FINAL
from suture.storage.resume import Resume

SHARED = "one Adam over all tasks"
OPTIMIZERS = ["adam", "shared_adam", "shared_adam_pairs"]


@pytest.mark.parametrize("name", golden.names("surgery_v1"))
def test_the_trajectory_equals_the_reference(name):
    case, _, _, tensors = golden.load(name)
    tasks = [str(t) for t in range(len(tensors["merged_features"]))]
    modules = SurgeryModules(tasks, tensors["down"].shape[2], case["rank"], dtype=torch.float64)
    modules.down.data.copy_(tensors["down_init"])
    everyone = slice(0, len(tasks))
    optimizer = "shared_adam" if case["optimizer"].startswith(SHARED) else "adam"
    rows, wanted = list(tensors["merged_features"][:, :, None]), list(tensors["expert_features"])
    losses = constant_losses(modules, everyone, rows, wanted, lambda step: list(tensors["batches"][step]))
    history = descend(Descent([modules], [everyone], case["lr"], optimizer), case["steps"], losses, {FINAL: modules})
    for found, key in ((modules.down, "down"), (modules.up, "up"), (history, "losses")):
        torch.testing.assert_close(found.detach(), tensors[key], rtol=0, atol=1e-9)


def network(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Dropout(0.5), nn.Linear(10, 5)).to(dtype)


def problem(tasks=3, sizes=(40, 30, 50), dtype=torch.float64):
    module = network(dtype=dtype)
    experts = {f"t{i}": network(i + 1, dtype) for i in range(tasks)}
    inputs = {task: torch.randn(n, 6, dtype=dtype) for task, n in zip(experts, sizes, strict=False)}
    return module, experts, inputs


def order(steps, tasks, batches_per_turn):
    """(step, task) as the batches come: with 2 a turn A1 A2 B1 B2 A3 A4 …, as in the authors' scripts."""
    for start in range(0, steps, batches_per_turn):
        for task in tasks:
            yield from ((step, task) for step in range(start, min(start + batches_per_turn, steps)))


def textbook(module, experts, inputs, *, rank, steps, lr, batch_size, seed, optimizer):
    """Both encoders at every step, one task after another, gradients by autograd."""
    streams = {task: ShuffledBatches(x, batch_size, seed=seed, name=task) for task, x in inputs.items()}
    start = SurgeryModules(list(experts), 5, rank, seed=seed, dtype=torch.float64)
    pairs = {t: [nn.Parameter(p[i].detach().clone()) for p in (start.down, start.up)] for i, t in enumerate(experts)}
    one = torch.optim.Adam([p for pair in pairs.values() for p in pair], lr=lr)
    adams = {task: torch.optim.Adam(pair, lr=lr) if optimizer == "adam" else one for task, pair in pairs.items()}
    losses, tasks = torch.zeros(steps, len(pairs), dtype=torch.float64), list(pairs)
    for step, task in order(steps, tasks, 2 if optimizer == "shared_adam_pairs" else 1):
        (down, up), x = pairs[task], streams[task][step]
        with torch.no_grad():
            z, wanted = module.eval()(x), experts[task].eval()(x)
        loss = (z - (z @ down.T).relu() @ up.T - wanted).abs().mean()
        adams[task].zero_grad(set_to_none=False)
        loss.backward()
        adams[task].step()
        losses[step, tasks.index(task)] = loss.item()
    return pairs, losses


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("steps", [2, 7, 12])
def test_it_equals_the_loop_that_encodes_at_every_step(optimizer, steps):
    options = {"rank": 3, "steps": steps, "lr": 0.01, "batch_size": 8, "seed": 4}
    result = repair(*problem(), "final", **options, optimizer=optimizer, encode_batch=7)
    pairs, losses = textbook(*problem(), **options, optimizer=optimizer)
    torch.testing.assert_close(result.losses, losses, rtol=0, atol=1e-12)
    modules = result.model.repair_at[FINAL]
    for i, (down, up) in enumerate(pairs.values()):
        torch.testing.assert_close(modules.down[i], down.detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(modules.up[i], up.detach(), rtol=0, atol=1e-12)


def test_the_orders_of_batches_differ_at_first_and_agree_in_the_end():
    module, experts, inputs = problem()
    run = lambda **options: repair(module, experts, inputs, rank=3, **options).losses
    options = {"lr": 0.01, "steps": 12}
    by_turns, by_pairs = (run(optimizer=optimizer, **options) for optimizer in ("shared_adam", "shared_adam_pairs"))
    assert not torch.allclose(by_turns, by_pairs)
    by_turns, by_pairs = (run(optimizer=o, lr=0.01, steps=600)[-100:].mean() for o in OPTIMIZERS[1:])
    torch.testing.assert_close(by_turns, by_pairs, rtol=0.02, atol=0)


def counted(module, seen):
    module.register_forward_hook(lambda m, arguments, output: seen.append(len(output)))
    return module


def test_each_input_that_is_used_is_encoded_once_by_each_model():
    module, experts, inputs = problem()
    seen = []
    for encoder in (module, *experts.values()):
        counted(encoder, seen)
    result = repair(module, experts, inputs, steps=100, batch_size=8)
    assert sum(seen) == 2 * (40 + 30 + 50)
    assert (result.passes.merged, result.passes.experts) == (120, 120)
    assert repair(module, experts, inputs, steps=2, batch_size=8).passes.merged == 3 * 16


def test_encodings_are_kept_by_content_and_cost_no_pass_again(tmp_path):
    module, experts, inputs = problem()
    first = repair(module, experts, inputs, steps=5, rank=2, cache=tmp_path)
    again = repair(module, experts, inputs, steps=9, rank=4, seed=1, cache=tmp_path)
    assert (first.passes.merged, again.passes.merged, again.passes.experts) == (120, 0, 0)
    plain = repair(module, experts, inputs, steps=9, rank=4, seed=1)
    assert torch.equal(again.losses, plain.losses)
    module[0].bias.data += 1
    assert repair(module, experts, inputs, steps=1, cache=tmp_path).passes.merged == 120
    inputs["t0"] = inputs["t0"] + 1
    changed = repair(module, experts, inputs, steps=1, cache=tmp_path).passes
    assert (changed.merged, changed.experts) == (40, 40)
    scaled = [repair(module, experts, inputs, steps=1, cache=tmp_path, forward=_scaled(k)) for k in (1, 2, 2)]
    assert [result.passes.merged for result in scaled] == [120, 120, 0]


def _scaled(factor):
    return lambda module, inputs: factor * module(inputs)


def test_a_damaged_cache_is_made_again(tmp_path):
    first = repair(*problem(), steps=3, cache=tmp_path)
    for file in tmp_path.iterdir():
        file.write_bytes(b"nothing")
    again = repair(*problem(), steps=3, cache=tmp_path)
    assert again.passes.merged == 120
    assert torch.equal(first.losses, again.losses)


class Killed(Exception):
    pass


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("at", [0, 4, 9])
def test_a_killed_loop_goes_on_to_the_same_bits(tmp_path, at, optimizer):
    options = {"steps": 10, "lr": 0.01, "optimizer": optimizer}
    state = lambda: Resume(tmp_path / "state.pt", {"lr": 0.01}, every=0)

    def kill(step, losses, modules):
        if step == at:
            raise Killed

    with pytest.raises(Killed):
        repair(*problem(), **options, resume=state(), on_step=kill)
    steps = []
    result = repair(*problem(), **options, resume=state(), on_step=lambda step, *_: steps.append(step))
    whole = repair(*problem(), **options)
    first = at + 2 - at % 2 if optimizer == "shared_adam_pairs" else at + 1  # a turn is never cut in two
    assert steps == list(range(first, 10))
    assert torch.equal(result.losses, whole.losses)
    assert torch.equal(result.model.repair_at[FINAL].up, whole.model.repair_at[FINAL].up)


def test_the_modules_can_be_looked_at_after_any_step_without_a_pass():
    module, experts, inputs = problem()
    looked = {}

    def look(step, losses, modules):
        if step % 5 == 4:
            looked[step] = modules[FINAL].up.detach().clone()

    result = repair(module, experts, inputs, steps=10, on_step=look)
    assert list(looked) == [4, 9]
    assert torch.equal(looked[4], repair(module, experts, inputs, steps=5).model.repair_at[FINAL].up)
    assert torch.equal(looked[9], result.model.repair_at[FINAL].up)


@pytest.mark.parametrize("variant", ["standard", "centred", "normalised"])
def test_every_variant_comes_nearer_to_the_expert(variant):
    result = repair(*problem(), steps=200, lr=0.01, variant=variant)
    assert (result.losses[-10:].mean(0) < 0.8 * result.losses[:10].mean(0)).all()
    assert result.warnings == ()
    assert all(share > 0.5 for share in result.active.values())
    assert result.added_parameters == 3 * 2 * 16 * 5 + (15 if variant == "centred" else 0)


def test_dead_modules_are_reported():
    module, experts, inputs = problem()
    blind = nn.Sequential(module, nn.ReLU())
    with torch.no_grad():
        module[3].bias.fill_(-100)  # features that are zero: no unit can ever fire
    result = repair(blind, experts, inputs, steps=3, variant="standard")
    assert result.active == dict.fromkeys(experts, 0.0)
    assert len(result.warnings) == 3
    assert all(line.endswith("Remedy: variant=centred.") for line in result.warnings)
    constant = repair(blind, experts, inputs, steps=3)
    assert constant.warnings[0] == "variant=centred, because 100% of the features are ≥ 0."
    assert all(line.endswith("Remedy: repair=affine.") for line in constant.warnings[1:])


def test_the_variant_is_centred_by_default_where_features_cannot_be_negative(tmp_path):
    module, experts, inputs = problem()
    build = lambda encoder: nn.Sequential(encoder, nn.ReLU())
    positive = build(module), {task: build(expert) for task, expert in experts.items()}, inputs
    options = {"steps": 200, "lr": 0.01}
    auto, centred = (repair(*positive, **options, variant=variant) for variant in ("auto", "centred"))
    assert auto.warnings == ("variant=centred, because 100% of the features are ≥ 0.",)
    assert auto.model.repair_at[FINAL].variant == "centred"
    assert torch.equal(auto.losses, centred.losses)
    assert (auto.losses[-10:].mean(0) < auto.losses[:10].mean(0)).all()
    assert all(share == 1 for share in auto.active.values())
    auto.model.save(tmp_path / "modules.safetensors")
    loaded = SurgeryModel.load(tmp_path / "modules.safetensors", positive[0])
    assert torch.equal(loaded(inputs["t1"], "t1"), auto.model(inputs["t1"], "t1"))


def test_the_default_equals_the_standard_variant_bit_by_bit_where_features_have_both_signs():
    auto, standard = (repair(*problem(), steps=20, **options) for options in ({}, {"variant": "standard"}))
    assert auto.warnings == ()
    assert auto.model.repair_at[FINAL].variant == "standard"
    for one, other in zip(auto.model.repairs.parameters(), standard.model.repairs.parameters(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(auto.losses, standard.losses)


def test_the_caller_s_modules_and_modes_are_left_alone():
    module, experts, inputs = problem()
    models = [module, *experts.values()]
    before = [{name: w.clone() for name, w in m.state_dict().items()} for m in models]
    repair(module.train(), experts, inputs, steps=3)
    for m, state in zip(models, before, strict=True):
        assert all(torch.equal(w, state[name]) for name, w in m.state_dict().items())
        assert all(part.training for part in m.modules())
        assert all(p.requires_grad and p.grad is None for p in m.parameters())
        assert not any(part._forward_hooks for part in m.modules())


def test_experts_may_be_loaded_one_after_another_into_one_module():
    module, experts, inputs = problem()
    shared = network(9)

    def expert(task):
        shared.load_state_dict(experts[task].state_dict())
        return shared

    one, other = (repair(module, e, inputs, steps=5) for e in (expert, experts))
    assert torch.equal(one.losses, other.losses)


def test_the_result_does_not_depend_on_which_other_tasks_there_are():
    module, experts, inputs = problem()
    alone = repair(module, experts, {"t1": inputs["t1"]}, steps=8)
    torch.testing.assert_close(repair(module, experts, inputs, steps=8).losses[:, 1], alone.losses[:, 0])


def test_bad_input_is_refused_in_one_line():
    module, experts, inputs = problem()
    cases = [
        (lambda: repair(module, experts, inputs, "finale"), "Unknown repair 'finale'.*final"),
        (lambda: repair(module, experts, inputs, rnak=3), "Unknown knob of repair=final 'rnak'.*rank"),
        (lambda: repair(module, experts, inputs, rank=0), "repair.rank=0 does not fit repair=final"),
        (lambda: repair(module, experts, inputs, lr=-1), "repair.lr=-1"),
        (lambda: repair(module, experts, inputs, variant="center"), "repair.variant='center'"),
        (lambda: repair(module, {}, inputs), "Task 't0' has inputs but no expert"),
        (lambda: repair(module, experts, {}), "no inputs to repair with"),
        (lambda: repair(lambda_module(), experts, {"t0": torch.randn(2, 3, 6).double()}), "wanted features"),
    ]
    for call, message in cases:
        with pytest.raises(ConfigError, match=message) as refused:
            call()
        assert "\n" not in str(refused.value)
    with pytest.raises(DataError, match="Task 't0' has no inputs"):
        Problem(module, experts, {"t0": torch.empty(0, 6)})
    with pytest.raises(DataError, match="loss is nan at step 0"):
        repair(module, experts, {"t0": torch.full((4, 6), torch.nan, dtype=torch.float64)})


def lambda_module():
    return nn.Linear(6, 5).double()


@pytest.mark.parametrize("kind", ["final", "deep", "blend"])
@pytest.mark.parametrize("widths", [(5, 4), (5, 5), (4, 5)])
def test_experts_of_other_widths_are_refused(kind, widths, tmp_path):
    build = lambda dim: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, dim))
    experts = {task: build(dim) for task, dim in zip("ab", widths, strict=True)}
    inputs = {task: torch.randn(20, 3) for task in experts}
    options = {"steps": 3, "blocks": ["0"]} if kind == "deep" else {"steps": 3}
    message = r"The expert of task '[ab]' gives .*features of width \d, the merged module of width \d\. Remedy"
    for cache in (None, tmp_path, tmp_path):
        with pytest.raises(IncompatibleModels, match=message):
            repair(build(4), experts, inputs, kind, cache=cache, **options)


def test_what_is_no_tensor_or_module_is_refused_in_one_line():
    program = """
import torch
from torch import nn
from suture import SutureError, repair
linear, rows = nn.Linear(3, 4), torch.randn(20, 3)
for experts, inputs in [
    ({"a": linear}, {"a": [[1.0, 2.0, 3.0]] * 20}),
    ({"a": linear}, {"a": {"x": [1, 2]}}),
    ({"a": linear}, {"a": torch.tensor(3.0)}),
    ({"a": linear}, {"a": []}),
    ({"a": linear}, [rows]),
    ([linear], {"a": rows}),
    ({"a": None}, {"a": rows}),
]:
    try:
        repair(nn.Linear(3, 4), experts, inputs, steps=3)
    except SutureError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    expected = [
        "The inputs of task 'a' are a float; wanted a tensor",
        "'a' are or hold a int; wanted a tensor",
        "'a' are or hold a tensor without axes",
        "The inputs of task 'a' have no batches",
        "wanted a mapping from task to inputs",
        "experts is a list; wanted a mapping",
        "The expert of task 'a' is a NoneType; wanted a module",
    ]
    for line, message in zip(done.stdout.splitlines(), expected, strict=True):
        assert message in line
