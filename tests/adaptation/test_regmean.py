"""RegMean and RegMean++: parity with the reference vectors, laws, architectures, bad input."""

import pytest
import torch
from torch import nn

from suture.adaptation import regmean, regmean_pp
from suture.errors import ConfigError, DataError
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


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def models_of(count):
    base = network().state_dict()
    noise = lambda t: {name: x + 0.3 * torch.randn(x.shape, dtype=x.dtype) for name, x in base.items()}
    return base, {f"t{t}": noise(t) for t in range(count)}


both = pytest.mark.parametrize(
    "method", [regmean, lambda *a, **k: regmean_pp(*a, blocks=["0", "2"], **k)], ids=["", "pp"]
)


@both
def test_one_model_is_given_back(method):
    base, models = models_of(1)
    merged = method(network(), base, models, {"t0": torch.randn(30, 6).double()}).merged
    for name, tensor in models["t0"].items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-12)


@both
def test_neither_batches_nor_the_order_of_models_matter_and_nothing_of_the_caller_s_changes(method):
    base, models = models_of(3)
    inputs = {name: torch.randn(20, 6).double() for name in models}
    module, before = network(), network().state_dict()
    one = method(module, base, models, inputs)
    other = method(module, base, dict(reversed(models.items())), dict(reversed(inputs.items())), batch_size=3)
    for name, tensor in one.merged.items():
        torch.testing.assert_close(other.merged[name], tensor, rtol=0, atol=1e-11)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert not one.warnings


def test_layers_gathered_in_several_passes_give_the_same(monkeypatch):
    from suture.adaptation import regression_mean

    base, models = models_of(2)
    inputs = {name: torch.randn(20, 6).double() for name in models}
    one = regmean(network(), base, models, inputs)
    monkeypatch.setattr(regression_mean, "_BYTES", 1)
    other = regmean(network(), base, models, inputs)
    assert all(torch.equal(other.merged[name], tensor) for name, tensor in one.merged.items())


def test_directions_that_no_input_has_stay_at_the_mean():
    base, models = models_of(2)
    inputs = {name: torch.cat([torch.randn(20, 3), torch.zeros(20, 3)], 1).double() for name in models}
    merged = regmean(network(), base, models, inputs, off_diagonal=1.0).merged["0.weight"]
    mean = torch.stack([model["0.weight"] for model in models.values()]).mean(0)
    torch.testing.assert_close(merged[:, 3:], mean[:, 3:], rtol=0, atol=1e-12)
    assert not torch.allclose(merged[:, :3], mean[:, :3])


def test_too_few_inputs_are_told():
    base, models = models_of(2)
    warnings = regmean(network(), base, models, {name: torch.randn(1, 6).double() for name in models}).warnings
    assert warnings[0] == (
        "'0.weight' has 2 input rows for 6 columns: it stays at the mean in the other directions. Remedy: more inputs."
    )


def test_frozen_tensors_stay_at_the_base():
    base, models = models_of(2)
    inputs = {name: torch.randn(20, 6).double() for name in models}
    merged = regmean(network(), base, models, inputs, frozen=["0.weight"]).merged
    assert torch.equal(merged["0.weight"], base["0.weight"])


@both
def test_what_cannot_be_merged_is_refused_in_one_line(method):
    base, models = models_of(2)
    inputs = {name: torch.randn(20, 6).double() for name in models}
    with pytest.raises(ConfigError, match="inputs have something for 'other'; wanted one entry a model: t0, t1"):
        method(network(), base, models, inputs | {"other": inputs["t0"]})
    with pytest.raises(DataError, match=r"Task 't1': the inputs of '0\.weight' are not finite\. Remedy: check"):
        method(network(), base, models, inputs | {"t1": inputs["t1"] * torch.inf})
    with pytest.raises(DataError, match="Task 't1' has no inputs"):
        method(network(), base, models, inputs | {"t1": inputs["t1"][:0]})
