"""Affine maps of the final feature: a case worked by hand, the closed form, few inputs, files, folding into heads."""

import json

import pytest
import torch
from desk import refused
from torch import nn

from suture.checkpoints import open_checkpoint, save_checkpoint
from suture.cli.main import main
from suture.core.head import Head
from suture.errors import CheckpointError, ConfigError, DataError, IncompatibleModels
from suture.repairs import AffineMaps, Problem, SurgeryModel, fit_router, repair, representation
from suture.repairs.affine import GRID
from suture.repairs.network import FINAL


def network(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Dropout(0.5), nn.Linear(10, 5)).to(dtype)


def problem(tasks=3, count=60, dtype=torch.float64):
    module = network(dtype=dtype)
    experts = {f"t{i}": network(i + 1, dtype) for i in range(tasks)}
    return module, experts, {task: torch.randn(count + i, 6, dtype=dtype) for i, task in enumerate(experts)}


def test_a_case_worked_by_hand():
    identity, expert = nn.Identity(), nn.Linear(1, 1).double()
    nn.init.constant_(expert.weight, 3.0)
    nn.init.constant_(expert.bias, 1.0)
    inputs = {"t": torch.tensor([[1.0], [3.0]], dtype=torch.float64)}
    # z = 1, 3 and y = 4, 10: centred ∓1, residuals y − z = 3, 7, centred ∓2. With ridge 1 and λ = 1 · 2:
    # A − 1 = (2 + 2) / (2 + 2) = 1, and c = 7 − 2 · 2 = 3
    maps = repair(identity, {"t": expert}, inputs, "affine", ridge=1.0).model.repair_at[FINAL]
    assert (maps.weight.item(), maps.bias.item()) == (pytest.approx(2.0), pytest.approx(3.0))
    exact = repair(identity, {"t": expert}, inputs, "affine", ridge=1e-12).model.repair_at[FINAL]
    assert (exact.weight.item(), exact.bias.item()) == (pytest.approx(3.0), pytest.approx(1.0))


@pytest.mark.parametrize("ridge", [1e-3, 0.5])
def test_the_maps_minimise_the_penalised_squared_error(ridge):
    module, experts, inputs = problem()
    maps = repair(module, experts, inputs, "affine", ridge=ridge).model.repair_at[FINAL]
    for i, task in enumerate(experts):
        with torch.no_grad():
            z, goal = module.eval()(inputs[task]), experts[task].eval()(inputs[task])
        a = maps.weight[i].clone().requires_grad_()
        c = maps.bias[i].clone().requires_grad_()
        strength = ridge * (z - z.mean(0)).square().sum() / z.shape[1]
        loss = (z @ a.T + c - goal).square().sum() + strength * (a - torch.eye(5)).square().sum()
        for gradient in torch.autograd.grad(loss, (a, c)):
            assert gradient.abs().max() < 1e-10


def test_an_expert_that_is_an_affine_map_of_the_merged_model_is_matched():
    module, _, inputs = problem(2)
    experts = {task: nn.Sequential(module, nn.Linear(5, 5).double()) for task in inputs}
    result = repair(module, experts, inputs, "affine", ridge=1e-12)
    for task, expert in experts.items():
        torch.testing.assert_close(result.model(inputs[task], task), expert.eval()(inputs[task]), rtol=0, atol=1e-8)
    assert result.learned == "modules, solved"
    assert result.added_parameters == 2 * (25 + 5)


def test_the_ridge_is_chosen_by_held_out_inputs_and_named():
    module, experts, inputs = problem(2, count=400)
    result = repair(module, experts, inputs, "affine")
    assert result.warnings[0].startswith("ridge, by the error on held-out inputs: t0 ")
    chosen = [float(part.split()[-1].rstrip(".")) for part in result.warnings[0].split(", by")[1].split(",")]
    assert set(chosen) <= set(GRID)
    by_hand = repair(module, {"t0": experts["t0"]}, {"t0": inputs["t0"]}, "affine", ridge=chosen[0])
    assert torch.equal(by_hand.model.repair_at[FINAL].weight[0], result.model.repair_at[FINAL].weight[0])
    assert by_hand.warnings == ()
    noise = {"t0": nn.Sequential(module, _Noise())}
    few = repair(module, noise, {"t0": inputs["t0"][:12]}, "affine")
    assert few.warnings[0].endswith("t0 10."), "twelve inputs say nothing about a map onto noise"


class _Noise(nn.Module):
    def forward(self, features):
        return torch.randn(features.shape, generator=torch.Generator().manual_seed(1), dtype=features.dtype)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_few_inputs_move_the_mean_and_little_else(count):
    module, experts, inputs = problem(1, count=50)
    few = {"t0": inputs["t0"][:count]}
    result = repair(module, experts, few, "affine")
    with torch.no_grad():
        goal, repaired = experts["t0"].eval()(few["t0"]), result.model(few["t0"], "t0")
    torch.testing.assert_close(repaired.mean(0), goal.mean(0), rtol=0, atol=1e-12)
    assert result.model.repair_at[FINAL].weight.isfinite().all()
    if count == 1:
        assert torch.equal(result.model.repair_at[FINAL].weight[0], torch.eye(5, dtype=torch.float64))


def test_constant_features_are_shifted_onto_the_experts_mean():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.value = nn.Parameter(torch.tensor([1.0, 2.0, 0.0, 0.0, -1.0], dtype=torch.float64))

        def forward(self, x):
            return self.value.expand(len(x), -1)

    _, experts, inputs = problem()
    result = repair(Constant(), experts, inputs, "affine")
    for task, expert in experts.items():
        mean = expert.eval()(inputs[task]).mean(0)
        torch.testing.assert_close(result.model(inputs[task], task)[0], mean, rtol=0, atol=1e-12)


def test_the_maps_are_saved_and_loaded_with_their_router(tmp_path):
    module, experts, inputs = problem(dtype=torch.float32)
    model = repair(module, experts, inputs, "affine").model
    assert model.features_suffice
    task = Problem(module, experts, inputs)
    model.router = fit_router({name: task.merged_rows(name, rows) for name, rows in inputs.items()})
    model.save(tmp_path / "maps.safetensors")
    loaded = SurgeryModel.load(tmp_path / "maps.safetensors", module)
    x = inputs["t1"]
    assert loaded.kind == "affine"
    for repaired in (loaded(x, "t1"), loaded.for_task("t1")(x), loaded.repair(loaded.encode(x), "t1")):
        torch.testing.assert_close(repaired, model(x, "t1"), rtol=0, atol=1e-6)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=1e-6)
    mixed = loaded(torch.cat([inputs["t0"][:2], x[:2]]), torch.tensor([0, 0, 1, 1]))
    torch.testing.assert_close(mixed[2:], model(x[:2], "t1"), rtol=0, atol=1e-6)
    compared = representation(model, experts, inputs)
    assert (compared.after.l1[:, -1] < compared.before.l1[:, -1]).all()
    with pytest.raises(IncompatibleModels, match="of width 4, an affine map takes 5"):
        SurgeryModel.load(tmp_path / "maps.safetensors", nn.Linear(6, 4))(x, "t1")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": torch.eye(5)[None]}, r"has no '\(features\)/bias'"),
        ({"weight": torch.eye(5)[None], "bias": torch.zeros(1, 4)}, r"shapes \(1, 5, 5\) and \(1, 4\) are none of 1"),
        ({"weight": torch.eye(5).expand(2, 5, 5), "bias": torch.zeros(2, 5)}, "are none of 1 tasks"),
        ({"weight": torch.zeros(1, 5, 4), "bias": torch.zeros(1, 5)}, "are none of 1 tasks"),
    ],
)
def test_files_without_whole_maps_are_refused(tmp_path, tensors, message):
    facts = {"kind": "affine", "tasks": ["t"], "rank": 5, "blocks": [], "variant": "affine"}
    content = {f"(features)/{name}": tensor.clone() for name, tensor in tensors.items()}
    save_checkpoint(content, tmp_path / "x.safetensors", {k: json.dumps(v) for k, v in facts.items()})
    with pytest.raises(CheckpointError, match=message) as refusal:
        SurgeryModel.load(tmp_path / "x.safetensors", network())
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("variant", [3, None, "affine", {"other": "standard"}, ["standard"]])
def test_a_file_with_an_unknown_variant_is_refused(tmp_path, variant):
    module, experts, inputs = problem()
    repair(module, experts, inputs, steps=1).model.save(tmp_path / "x.safetensors")
    with open_checkpoint(tmp_path / "x.safetensors") as file:
        facts, content = {**file.metadata, "variant": json.dumps(variant)}, {n: t.clone() for n, t in file.items()}
    save_checkpoint(content, tmp_path / "y.safetensors", facts)
    with pytest.raises(CheckpointError, match="nknown variant"):
        SurgeryModel.load(tmp_path / "y.safetensors", module)


@pytest.mark.parametrize("bias", [True, False])
def test_a_folded_head_gives_the_logits_of_map_and_head(bias):
    module, experts, inputs = problem()
    model = repair(module, experts, inputs, "affine").model
    head = Head(torch.randn(7, 5).double(), torch.randn(7).double() if bias else None, scale=0.3)
    for i, task in enumerate(experts):
        folded = model.repair_at[FINAL].fold_into_head(head, i)
        torch.testing.assert_close(
            folded(model.encode(inputs[task])), head(model(inputs[task], task)), rtol=0, atol=1e-12
        )


def test_heads_that_are_not_linear_in_the_feature_are_not_folded():
    maps = AffineMaps(torch.eye(2)[None], torch.zeros(1, 2))
    with pytest.raises(ConfigError, match="normalises the features first, as zero-shot heads do"):
        maps.fold_into_head(Head(torch.eye(2), normalised=True), 0)
    with pytest.raises(ConfigError, match="has layers of its own before its weights"):
        maps.fold_into_head(Head(torch.eye(2), before=nn.Tanh()), 0)


def test_features_that_are_not_finite_and_wrong_knobs_are_refused():
    module, experts, inputs = problem()
    with pytest.raises(DataError, match="Task 't0': some features are not finite"):
        repair(module, experts, {"t0": torch.full((4, 6), torch.nan, dtype=torch.float64)}, "affine")
    with pytest.raises(ConfigError, match=r"repair\.ridge=0"):
        repair(module, experts, inputs, "affine", ridge=0)


def rows_of(folder):
    return {row["name"]: row for row in json.loads((folder / "report.json").read_text())["rows"]}


def test_a_run_folds_the_maps_into_the_heads_that_are_saved_with_the_model(texts):
    from transformers import AutoModelForSequenceClassification

    assert main(texts.words("repair=affine", "repair.split=train")) == 0
    out = texts.folder / "out"
    rows = rows_of(out)
    assert {"task_arithmetic + affine", "task_arithmetic + affine, routed"} <= set(rows)
    plain, folded = (
        AutoModelForSequenceClassification.from_pretrained(out / name / "tasks" / "colour")
        for name in ("model", "model_affine")
    )
    tokens = {"input_ids": torch.tensor([[2, 5, 9, 12, 3]]), "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    maps = SurgeryModel.load(out / "surgery.safetensors", plain.bert, forward=lambda m, x: m(**x).pooler_output)
    with torch.no_grad():
        expected = plain.classifier(maps(tokens, "colour"))
        torch.testing.assert_close(folded(**tokens).logits, expected, rtol=0, atol=1e-5)
        assert not torch.allclose(folded(**tokens).logits, plain(**tokens).logits, atol=1e-3)


def test_a_run_says_that_zero_shot_heads_are_not_folded(desk):
    assert main(desk.words("repair=affine", method="task_arithmetic")) == 0
    out = desk.folder / "out"
    assert (out / "surgery.safetensors").is_file()
    assert not (out / "model_affine").exists()
    notes = " ".join(json.loads((out / "report.json").read_text())["notes"])
    reason = "that of 'first' normalises the features first, as zero-shot heads do for their cosines."
    assert f"stay beside the model and are not folded into the heads: {reason}" in notes


def test_nothing_can_follow_affine_maps(desk, capsys):
    assert "nothing can follow affine" in refused(capsys, desk.words("repair=affine+final"))
