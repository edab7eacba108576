"""SyMerge: parity with the reference trajectory, resuming, refusals."""

import pytest
import torch
from torch import nn

from suture.adaptation import symerge
from suture.errors import ConfigError
from suture.storage.resume import Resume
from tests.support import second_family

GIVEN = second_family.tensors("symerge")
TASKS = ("model_0", "model_1", "model_2")


class Reference(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.n, self.b = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 5, bias=False)

    def forward(self, x):
        return self.b(self.n(self.a(x).tanh()))


def learned(**options):
    states = [second_family.part("symerge", part) for part in ("base", *TASKS)]
    batches = {task: list(GIVEN["inputs"][:, t]) for t, task in enumerate(TASKS)}
    heads = {task: GIVEN[f"head_{t}"] for t, task in enumerate(TASKS)}
    order = [[TASKS[t] for t in row] for row in GIVEN["order"].tolist()]
    models = dict(zip(TASKS, states[1:], strict=True))
    return symerge(Reference().double(), states[0], models, batches, heads, **{"order": order} | options)


def test_the_trajectory_equals_the_reference():
    result = learned()
    names = second_family.INDEX["symerge"]["parameter_order"]
    order = [names.index(name) for name in result.coefficients.layers]
    torch.testing.assert_close(result.history, GIVEN["coefficients"][..., order], rtol=0, atol=1e-10)
    torch.testing.assert_close(result.losses, GIVEN["losses"], rtol=0, atol=1e-10)
    for t, task in enumerate(TASKS):
        torch.testing.assert_close(result.heads[task].weights, GIVEN[f"final_head_{t}"], rtol=0, atol=1e-10)
        torch.testing.assert_close(result.heads[task].bias, GIVEN[f"final_bias_{t}"], rtol=0, atol=1e-10)


def test_the_merged_model_has_the_learned_coefficients():
    result, base = learned(), second_family.part("symerge", "base")
    expected = base["a.weight"].clone()
    for t, task in enumerate(TASKS):
        value = result.coefficients.values[t, result.coefficients.layers.index("a.weight")]
        expected += value * (second_family.part("symerge", task)["a.weight"] - base["a.weight"])
    torch.testing.assert_close(result.merged["a.weight"], expected)


def test_an_interrupted_loop_resumes_to_the_same_bits(tmp_path):
    whole, resume = learned(), lambda: Resume(tmp_path / "state.pt", {"work": "1"}, every=0)
    learned(order=[[TASKS[t] for t in row] for row in GIVEN["order"].tolist()[:4]], resume=resume())
    resumed = learned(resume=resume())
    assert torch.equal(whole.history, resumed.history)
    assert all(torch.equal(whole.heads[task].weights, resumed.heads[task].weights) for task in TASKS)


def test_the_order_of_the_tasks_depends_on_the_seed_alone():
    one, again, other = (learned(order=None, rounds=3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.history, again.history)
    assert not torch.equal(one.history, other.history)


@pytest.mark.parametrize("missing", ["heads", "batches"])
def test_a_task_without_a_head_or_inputs_is_refused(missing):
    given = {"batches": {task: torch.zeros(4, 6) for task in TASKS}, "heads": dict.fromkeys(TASKS, torch.eye(5))}
    del given[missing]["model_1"]
    states = [second_family.part("symerge", part) for part in ("base", *TASKS)]
    with pytest.raises(ConfigError, match=f"{missing} lacks 'model_1'"):
        symerge(Reference().double(), states[0], dict(zip(TASKS, states[1:], strict=True)), **given)
