"""The online setting: one pass, one step for each input; and blends of experts."""

import pytest
import torch
from torch import nn

from suture.errors import ConfigError
from suture.repairs import BlendModel, Problem, SurgeryModules, repair
from suture.repairs.network import FINAL
from suture.repairs.online import online
from suture.storage.resume import Resume


def encoder(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()


def problem():
    module, experts = encoder(0), {f"t{i}": encoder(i + 1) for i in range(2)}
    torch.manual_seed(7)
    inputs = {task: torch.randn(n, 6, dtype=torch.float64) for task, n in zip(experts, (30, 17), strict=True)}
    return module, experts, inputs


@pytest.mark.parametrize("shuffle", [True, False])
def test_it_equals_a_plain_loop_over_single_inputs(shuffle):
    module, experts, inputs = problem()
    result = online(Problem(module, experts, inputs), rank=3, lr=0.01, shuffle=shuffle, fractions=[0.5, 1.0])
    start = SurgeryModules(list(inputs), 5, 3, dtype=torch.float64)
    for t, (task, rows) in enumerate(inputs.items()):
        down, up = (nn.Parameter(p[t].detach().clone()) for p in (start.down, start.up))
        adam = torch.optim.Adam([down, up], lr=0.01)
        assert sorted(result.stream.order[task].tolist()) == list(range(len(rows)))
        assert shuffle != (result.stream.order[task].tolist() == list(range(len(rows))))
        for k, position in enumerate(result.stream.order[task]):
            x = rows[position][None]
            z, wanted = module(x).detach(), experts[task](x).detach()
            output = z - (z @ down.T).relu() @ up.T
            torch.testing.assert_close(result.stream.outputs[task][k], output[0].detach(), rtol=0, atol=1e-12)
            loss = (output - wanted).abs().mean()
            torch.testing.assert_close(result.losses[k, t], loss.detach(), rtol=0, atol=1e-12)
            adam.zero_grad()
            loss.backward()
            adam.step()
            if k + 1 == {"t0": 15, "t1": 9}[task]:
                kept = result.stages[0.5].repair_at[FINAL].up[t]
                torch.testing.assert_close(kept, up.detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(result.stages[1.0].repair_at[FINAL].up[t], up.detach(), rtol=0, atol=1e-12)


def test_each_input_is_encoded_once_by_each_model():
    module, experts, inputs = problem()
    seen = []
    for model in (module, *experts.values()):
        model.register_forward_hook(lambda m, arguments, output: seen.append(len(output)))
    result = online(Problem(module, experts, inputs, encode_batch=4))
    assert sum(seen) == 2 * (30 + 17)
    assert (result.passes.merged, result.passes.experts) == (47, 47)
    assert list(result.stages) == [0.01, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    result.stages[1.0](inputs["t0"], "t0")


def test_a_share_outside_of_the_stream_is_refused():
    with pytest.raises(ConfigError, match="0 is not a share"):
        online(Problem(*problem()), fractions=[0, 1])


def test_a_blend_is_the_weighted_sum_of_all_features_and_comes_near_the_expert(tmp_path):
    module, experts, inputs = problem()
    result = repair(module, experts, inputs, "blend", steps=300, lr=0.02)
    assert result.losses[0, 0].item() > 0.1
    assert (result.losses[-20:].mean(0) < 0.2 * result.losses[0]).all()
    assert (result.encoders, result.added_parameters) == (3, 6)
    assert "runs 3 encoders" in result.warnings[0]
    assert (result.passes.merged, result.passes.experts) == (47, 2 * 47)
    weights, x = result.model.weights, inputs["t1"]
    expected = sum(w * m(x) for w, m in zip(weights[1], (module, *experts.values()), strict=True))
    torch.testing.assert_close(result.model(x, "t1"), expected)
    by_row = result.model(x, torch.tensor([0, 1] * 8 + [0]))
    torch.testing.assert_close(by_row[1::2], expected[1::2])
    result.model.save(tmp_path / "blend.safetensors")
    again = BlendModel.load(tmp_path / "blend.safetensors", module, experts.__getitem__)
    assert torch.equal(again(x, "t1"), result.model(x, "t1"))


def test_a_blend_starts_as_the_merged_model_and_equals_a_plain_loop():
    module, experts, inputs = problem()
    result = repair(module, experts, {"t0": inputs["t0"]}, "blend", steps=3, batch_size=30, lr=0.1)
    weights = nn.Parameter(torch.tensor([1.0, 0.0], dtype=torch.float64))
    adam, x = torch.optim.Adam([weights], lr=0.1), inputs["t0"]
    z, wanted = module(x).detach(), experts["t0"](x).detach()
    for step in range(3):
        loss = (weights[0] * z + weights[1] * wanted - wanted).abs().mean()
        torch.testing.assert_close(result.losses[step, 0], loss.detach(), rtol=0, atol=1e-12)
        adam.zero_grad()
        loss.backward()
        adam.step()
    torch.testing.assert_close(result.model.weights[0], weights.detach(), rtol=0, atol=1e-12)


def test_a_killed_blend_goes_on_to_the_same_bits(tmp_path):
    def kill(step, losses, modules):
        if step == 4:
            raise KeyboardInterrupt

    state = lambda: Resume(tmp_path / "state.pt", {}, every=0)
    with pytest.raises(KeyboardInterrupt):
        repair(*problem(), "blend", steps=9, resume=state(), on_step=kill)
    one, whole = (repair(*problem(), "blend", steps=9, resume=r) for r in (state(), None))
    assert torch.equal(one.losses, whole.losses)
    assert torch.equal(one.model.weights, whole.model.weights)
