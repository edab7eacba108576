"""AdaRank: parity with the reference trajectories, resuming, refusals."""

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from suture.adaptation import adapt
from suture.errors import ConfigError
from suture.storage.resume import Resume
from tests.support import second_family


class Reference(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.n, self.b = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 5, bias=False)

    def forward(self, x):
        return self.b(self.n(self.a(x).tanh()))


def arguments(case, dtype=torch.float64):
    given, knobs = second_family.tensors(case), second_family.INDEX[case]["knobs"]
    states = [
        {name: tensor.to(dtype) for name, tensor in second_family.part(case, part).items()}
        for part in ("base", "model_0", "model_1", "model_2")
    ]
    head = lambda weight: lambda features: normalize(features, dim=-1) @ weight.to(features).T
    batches = {f"model_{t}": [x.to(dtype) for x in given["inputs"][:, t]] for t in range(3)}
    heads = {f"model_{t}": head(given[f"head_{t}"]) for t in range(3)}
    models = {f"model_{t}": state for t, state in enumerate(states[1:])}
    options = {"rank_share": knobs["rank"], "rank_temperature": knobs["temperature"], "centred": knobs["centred"]}
    options |= {"init_values": knobs["prior"], "lr": knobs["lr"], "max_steps": len(given["inputs"])}
    return (Reference().to(dtype), states[0], models, batches, heads), options


@pytest.mark.parametrize("concatenate", [True, False])
@pytest.mark.parametrize("case", second_family.names("loop", "adarank"))
def test_the_trajectory_equals_the_reference(case, concatenate):
    given, (positional, options) = second_family.tensors(case), arguments(case)
    result = adapt(*positional, **options, concatenate=concatenate)
    order = [second_family.INDEX[case]["parameter_order"].index(name) for name in result.coefficients.layers]
    torch.testing.assert_close(result.history, given["coefficients"][..., order], rtol=0, atol=1e-10)
    torch.testing.assert_close(result.losses, given["losses"], rtol=0, atol=1e-10)
    for name, logits in second_family.part(case, "mask_logits").items():  # whose ±0.1 are those of float32
        torch.testing.assert_close(result.mask_logits[name], logits, rtol=0, atol=2e-9)


def test_the_merged_model_has_the_components_that_are_on():
    positional, options = arguments("adarank")
    result = adapt(*positional, **options)
    _, base, models, *_ = positional
    name = "a.weight"
    column, expected = result.coefficients.layers.index(name), base[name].clone()
    for t, model in enumerate(models.values()):
        left, values, right = torch.linalg.svd(model[name] - base[name], full_matrices=False)
        on = result.mask_logits[name][t] > 0
        expected += result.coefficients.values[t, column] * (left * values * on) @ right
    torch.testing.assert_close(result.merged[name], expected)


def test_an_interrupted_loop_resumes_to_the_same_bits(tmp_path):
    positional, options = arguments("adarank", torch.float32)
    whole = adapt(*positional, **options)
    resume = lambda: Resume(tmp_path / "state.pt", {"work": "1"}, every=0)

    class Stopped(Exception):
        pass

    def stop(step, loss, values):
        if step == 4:
            raise Stopped

    with pytest.raises(Stopped):
        adapt(*positional, **options, resume=resume(), on_step=stop)
    resumed = adapt(*positional, **options, resume=resume())
    assert torch.equal(whole.history, resumed.history)
    assert all(torch.equal(whole.mask_logits[name], resumed.mask_logits[name]) for name in whole.mask_logits)
    assert all(torch.equal(whole.merged[name], resumed.merged[name]) for name in whole.merged)


@pytest.mark.parametrize("other", [{"plus_plus": True}, {"stream_vectors": True}, {"vectors_dtype": torch.bfloat16}])
def test_masks_are_refused_where_they_have_no_components(other):
    positional, options = arguments("adarank")
    with pytest.raises(ConfigError, match=f"with {next(iter(other))}"):
        adapt(*positional, **options, **other)
