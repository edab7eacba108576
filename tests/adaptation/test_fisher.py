"""Fisher merging: parity with the reference vectors, floors, drawn labels, bad input."""

import pytest
import torch
from torch import nn

from suture.adaptation import fisher
from suture.errors import ConfigError, DataError
from tests.support import second_family as family


class Reference(nn.Module):
    """The network of the reference vectors."""

    def __init__(self):
        super().__init__()
        self.a, self.n, self.b = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 5, bias=False)

    def forward(self, x):
        return self.b(self.n(self.a(x).tanh()))


def case_of(name, dtype=torch.float64):
    base, models, _ = family.inputs(name)
    cast = lambda state: {key: tensor.to(dtype) for key, tensor in state.items()}
    inputs = {model: family.tensors(name)["inputs"][t].to(dtype) for t, model in enumerate(models)}
    return Reference().to(dtype), cast(base), {model: cast(state) for model, state in models.items()}, inputs


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", family.names("fisher"))
def test_the_merge_equals_the_reference(name, dtype):
    knobs = family.INDEX[name]["knobs"]
    result = fisher(*case_of(name, dtype), normalise=knobs["normalise"], epsilon=knobs["floor"])
    for key, wanted in family.part(name, "merged").items():
        atol = 1e-10 if dtype == torch.float64 else 1e-4 * float(wanted.abs().max())
        torch.testing.assert_close(result.merged[key].double(), wanted, rtol=0, atol=atol)


def test_many_drawn_labels_come_close_to_the_sum_over_classes():
    case = case_of("fisher_plain")
    exact, few, many = (fisher(*case, labels=labels) for labels in (None, 1, 4000))
    error = lambda result: max((result.merged[key] - tensor).abs().max() for key, tensor in exact.merged.items())
    assert error(many) < 0.1 * error(few)
    assert "4000 labels drawn" in many.warnings[0]
    assert not exact.warnings
    assert all(torch.equal(fisher(*case, labels=1).merged[key], tensor) for key, tensor in few.merged.items())


def test_a_floor_above_all_entries_gives_the_average_and_says_so():
    module, base, models, inputs = case_of("fisher_plain")
    result = fisher(module, base, models, inputs, epsilon=1e9, normalise=False)
    mean = torch.stack([model["a.weight"] for model in models.values()]).mean(0)
    torch.testing.assert_close(result.merged["a.weight"], mean, rtol=0, atol=1e-8)
    assert all("close to an average. Remedy: floor=relative" in line for line in result.warnings)
    assert not fisher(module, base, models, inputs, floor="relative").warnings


def test_heads_and_tensors_without_a_gradient():
    class Features(Reference):
        def forward(self, x):
            return self.n(self.a(x).tanh())

    _, base, models, inputs = case_of("fisher_plain")
    heads = dict.fromkeys(models, nn.functional.linear)
    heads = {model: (lambda z, w=state["b.weight"]: z @ w.T) for model, state in models.items()}
    by_head = fisher(Features().double(), base, models, inputs, heads, normalise=False)
    whole = fisher(Reference().double(), base, models, inputs, normalise=False)
    mean = torch.stack([model["b.weight"] for model in models.values()]).mean(0)
    torch.testing.assert_close(by_head.merged["b.weight"], mean)
    torch.testing.assert_close(by_head.merged["a.weight"], whole.merged["a.weight"])


def test_what_cannot_be_merged_is_refused_in_one_line():
    module, base, models, inputs = case_of("fisher_plain")
    with pytest.raises(ConfigError, match=r"inputs lack 'model_0'; wanted one entry a model"):
        fisher(module, base, models, {key: x for key, x in inputs.items() if key != "model_0"})
    with pytest.raises(DataError, match=r"Task 'model_1': the gradients of .* are not finite"):
        fisher(module, base, models, inputs | {"model_1": inputs["model_1"] * torch.nan})
    with pytest.raises(ConfigError, match=r"have shape \(1, 1, 5\); wanted \(1, class\)"):
        fisher(module, base, models, inputs, forward=lambda m, x: m(x)[None])
