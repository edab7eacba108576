"""ProbSurgery: parity with the reference trajectory, the model that is left, resuming."""

import pytest
import torch
from torch import nn

from suture.errors import ConfigError
from suture.repairs import SurgeryModel, repair
from suture.repairs.fitting import Descent, descend
from suture.repairs.network import FINAL
from suture.repairs.prob_surgery import GaussianModules, gaussian_losses
from suture.storage.resume import Resume
from tests.support import second_family


def test_the_trajectory_equals_the_reference():
    given, knobs = second_family.tensors("prob_surgery"), second_family.INDEX["prob_surgery"]["knobs"]
    tasks, rank, dim = given["down_init"].shape
    modules = GaussianModules([str(t) for t in range(tasks)], dim, rank, dtype=torch.float64)
    modules.down.data.copy_(given["down_init"])
    rows, goals = list(given["merged_features"]), list(given["expert_features"])
    noise = lambda step, task, shape: given["noise"][step, task].view(shape)
    losses = gaussian_losses(modules, rows, goals, lambda step: list(given["batches"][step]), noise, knobs["kl"])
    descent = Descent([modules], [slice(0, tasks)], knobs["lr"], "adam")
    history = descend(descent, len(given["batches"]), losses, {FINAL: modules})
    found = {"down": modules.down, "mean": modules.up, "log_variance": modules.log_variance}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.detach(), given[name], rtol=0, atol=1e-10)
    torch.testing.assert_close(history.flatten(), given["losses"], rtol=0, atol=1e-10)


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 5))


def problem():
    return network(0), {"a": network(1), "b": network(2)}, {"a": torch.randn(30, 6), "b": torch.randn(20, 6)}


def test_the_repaired_model_adds_the_mean_and_comes_nearer_to_the_experts(tmp_path):
    module, experts, inputs = problem()
    result = repair(module, experts, inputs, "prob_surgery", rank=8, steps=400, lr=1e-2)
    for task, x in inputs.items():
        modules, z = result.model.repair_at[FINAL], module(x)
        i = result.model.tasks.index(task)
        expected = z - (z @ modules.down[i].T).relu() @ modules.up[i].T
        torch.testing.assert_close(result.model(x, task), expected)
        after, before = ((y - experts[task](x)).abs().mean().item() for y in (expected, z))
        assert after < 0.7 * before
    result.model.save(tmp_path / "modules.safetensors")
    again = SurgeryModel.load(tmp_path / "modules.safetensors", module)
    assert torch.equal(again(inputs["a"], "a"), result.model(inputs["a"], "a"))


def test_an_interrupted_fit_resumes_to_the_same_bits(tmp_path):
    module, experts, inputs = problem()
    options = {"rank": 4, "steps": 12}
    whole = repair(module, experts, inputs, "prob_surgery", **options)

    class Stopped(Exception):
        pass

    def stop(step, losses, modules):
        if step == 5:
            raise Stopped

    resume = Resume(tmp_path / "state.pt", {"work": "1"}, every=0)
    with pytest.raises(Stopped):
        repair(module, experts, inputs, "prob_surgery", resume=resume, on_step=stop, **options)
    resumed = repair(module, experts, inputs, "prob_surgery", resume=resume, **options)
    assert torch.equal(whole.losses, resumed.losses)
    assert torch.equal(whole.model.repair_at[FINAL].up, resumed.model.repair_at[FINAL].up)


def test_knobs_out_of_range_are_refused():
    module, experts, inputs = problem()
    with pytest.raises(ConfigError, match="divergence"):
        repair(module, experts, inputs, "prob_surgery", divergence=-1.0)
