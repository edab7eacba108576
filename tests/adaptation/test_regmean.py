"""RegMean and RegMean++: parity with the reference vectors, laws, architectures, bad input."""

import pytest
import torch
from torch import nn

from suture.adaptation import regmean, regmean_pp
from tests.support import second_family as family

DTYPES = [torch.float64, torch.float32]


def close(found, wanted, dtype):
    atol = 1e-10 if dtype == torch.float64 else 1e-4 * float(wanted.abs().max())
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=atol)


def layer_of(case):
    """The module of a reference case with one layer."""
    weight = family.tensors(case)["weights"][0]
    if family.INDEX[case]["layer"] == "linear":
        return nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    out, channels, height, width = weight.shape
    options = family.INDEX[case]["convolution"]
    return nn.Sequential(Widen(), nn.Conv2d(channels + 1, out, (height, width), bias=False, **options))


class Widen(nn.Module):
    """One more channel, of zeros: the reference's four channels would count as a raw input."""

    def forward(self, x):
        return torch.cat([x, torch.zeros_like(x[:, :1])], dim=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", family.names("layer", "regmean"))
def test_a_layer_equals_the_reference(name, dtype):
    case, tensors = family.INDEX[name], family.tensors(name)
    linear = case["layer"] == "linear"
    key = "weight" if linear else "1.weight"
    wider = lambda w: w if linear else torch.cat([w, torch.zeros_like(w[:, :1])], dim=1)
    models = {str(t): {key: wider(w).to(dtype)} for t, w in enumerate(tensors["weights"])}
    inputs = {str(t): x.to(dtype) for t, x in enumerate(tensors["inputs"])}
    base = {key: torch.zeros_like(models["0"][key])}
    forward = lambda module, x: module(x).flatten(1)
    knobs = {"off_diagonal": case["knobs"]["a"], "forward": forward, "batch_size": 7}
    result = regmean(layer_of(name).to(dtype), base, models, inputs, **knobs)
    close(result.merged[key] if linear else result.merged[key][:, :-1], tensors["merged"], dtype)


def clip_tower():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = family.INDEX["tower"]["config"]
    return CLIPVisionModel(CLIPVisionConfig(**config, attn_implementation="eager")).eval()


def pooled(module, pixels):
    return module(pixel_values=pixels).pooler_output


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", family.names("tower", "regmean", "regmean++"))
def test_a_tower_equals_the_reference(name, dtype, tmp_path):
    base, models, _ = family.inputs(name)
    inputs = {model: family.tensors("tower")["inputs"][t].to(dtype) for t, model in enumerate(models)}
    states = [{key: tensor.to(dtype) for key, tensor in state.items()} for state in (base, *models.values())]
    knobs = {"off_diagonal": family.INDEX[name]["knobs"]["a"], "forward": pooled, "batch_size": 5}
    method = regmean
    if family.INDEX[name]["method"] == "regmean++":
        method, knobs = regmean_pp, {**knobs, "after_blocks": "base", "cache": tmp_path}
    named = dict(zip(models, states[1:], strict=True))
    result = method(clip_tower().to(dtype), states[0], named, inputs, **knobs)
    for key, wanted in family.part(name, "merged").items():
        close(result.merged[key], wanted, dtype)
    assert not list(tmp_path.iterdir())
