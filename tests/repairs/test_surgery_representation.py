"""Distances to the experts, alignment, and the projection for a scatter plot."""

import pytest
import torch
from torch import nn

from suture.errors import ConfigError
from suture.repairs import linear_cka, project, repair, representation
from suture.repairs.network import FINAL


def tower(seed):
    torch.manual_seed(seed)
    block = lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    return nn.Sequential(nn.Sequential(*(nn.Sequential(block()) for _ in range(3))), nn.Linear(6, 4)).double()


def problem():
    torch.manual_seed(9)
    inputs = {f"t{i}": torch.randn(60, 6, dtype=torch.float64) for i in range(2)}
    return tower(0), {task: tower(i + 1) for i, task in enumerate(inputs)}, inputs


@pytest.mark.parametrize("kind", ["final", "deep"])
def test_a_repair_brings_the_layers_that_it_acts_on_nearer(kind):
    module, experts, inputs = problem()
    model = repair(module, experts, inputs, kind, steps=150, lr=0.01, rank=6).model
    found = representation(model, experts, inputs, batch_size=25)
    assert found.layers == ("0.0", "0.1", "0.2", FINAL)
    assert (found.after.l1[:, -1] < found.before.l1[:, -1]).all()
    unchanged = torch.equal(found.after.l1[:, :-1], found.before.l1[:, :-1])
    assert unchanged == (kind == "final")
    expert, merged = experts["t1"](inputs["t1"]), module(inputs["t1"])
    torch.testing.assert_close(found.before.l1[1, -1], (expert - merged).abs().mean())
    repaired = model(inputs["t1"], "t1")
    torch.testing.assert_close(found.after.l1[1, -1], (expert - repaired).abs().mean())
    torch.testing.assert_close(found.after.cka[1, -1], linear_cka(expert, repaired))
    assert found.scatter["t0"]["repaired"].shape == (60, 2)
    assert sum(found.explained["t0"]) > 0.4


def test_where_to_look_can_be_said():
    module, experts, inputs = problem()
    model = repair(module, experts, inputs, "deep", steps=2, blocks=["0.1"]).model
    look = lambda blocks: representation(model, experts, inputs, blocks=blocks)
    assert look(None).layers == ("0.1", FINAL)
    assert look([]).layers == (FINAL,)
    assert look(["0.0", "0.1", "0.2"]).layers == ("0.0", "0.1", "0.2", FINAL)
    assert torch.equal(look(["0.0", "0.1"]).after.l1[:, 1:], look(None).after.l1)


def test_a_module_without_blocks_has_its_final_feature():
    inputs = {"t": torch.randn(5, 3)}
    module, expert = nn.Linear(3, 4), nn.Linear(3, 4)
    model = repair(module, {"t": expert}, inputs, steps=1).model
    assert representation(model, {"t": expert}, inputs).layers == (FINAL,)


@pytest.mark.parametrize("count", [5, 50])
def test_alignment_is_that_of_its_definition(count):
    x, y = torch.randn(count, 8, dtype=torch.float64), torch.randn(count, 6, dtype=torch.float64)
    x, y = x - x.mean(0), y - y.mean(0)
    hsic = lambda a, b: torch.trace(a @ a.T @ b @ b.T)
    expected = hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()
    torch.testing.assert_close(linear_cka(x, y), expected, rtol=0, atol=1e-12)
    turn = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    torch.testing.assert_close(linear_cka(x, 3 * x @ turn + 1), torch.tensor(1.0, dtype=torch.float64))
    assert linear_cka(x, torch.ones(count, 3)) == 0


def test_the_projection_is_that_of_the_covariance_with_fixed_signs():
    features = {"a": torch.randn(30, 5, dtype=torch.float64), "b": torch.randn(20, 5, dtype=torch.float64) + 2}
    points, shares = project(features)
    both = torch.cat([*points.values()])
    torch.testing.assert_close(both.mean(0), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)
    variances = torch.linalg.eigvalsh(torch.cat([*features.values()]).T.cov()).flip(0)
    torch.testing.assert_close(both.var(0), variances[:2])
    assert shares == pytest.approx((variances[:2] / variances.sum()).tolist())
    again, _ = project({name: rows.flip(0) for name, rows in features.items()})
    torch.testing.assert_close(again["a"].flip(0), points["a"], rtol=0, atol=1e-10)
    assert project({"a": torch.arange(3.0)[:, None]})[0]["a"][:, 1].eq(0).all()


def test_a_repair_of_the_weights_is_compared_with_the_model_before_it():
    module, experts, inputs = problem()
    model = repair(module, experts, inputs, "calibrate").model
    found = representation(model, experts, inputs, merged=module)
    assert found.layers == ("0.0", "0.1", "0.2", FINAL)
    expert, merged, repaired = experts["t1"](inputs["t1"]), module(inputs["t1"]), model(inputs["t1"])
    torch.testing.assert_close(found.before.l1[1, -1], (expert - merged).abs().mean())
    torch.testing.assert_close(found.after.l1[1, -1], (expert - repaired).abs().mean())
    assert (found.after.l1[:, -1] < found.before.l1[:, -1]).all()
    with pytest.raises(ConfigError, match="Remedy: give merged="):
        representation(model, experts, inputs)
