"""ESM: parity with the reference vectors, laws, bad input."""

import pytest
import torch
from torch import nn

from suture.adaptation import esm
from suture.errors import ConfigError, DataError, SutureError
from suture.merging.methods.tsv_m import tsv_m
from tests.support import second_family as family


class Layers(nn.Module):
    """The reference's layers, each on inputs of its own."""

    def __init__(self, shapes):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"mlp": nn.ModuleDict({n: nn.Linear(i, o, bias=False) for n, (o, i) in block.items()})})
            for block in shapes
        )

    def forward(self, **inputs):
        return torch.cat([self.get_submodule(name.replace("/", "."))(x) for name, x in inputs.items()], dim=-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_layers_equal_the_reference(dtype):
    deltas, rows, wanted = (family.part("esm", part) for part in ("deltas", "inputs", "merged"))
    module = Layers([{n: deltas[f"layers.{i}.mlp.{n}"].shape[1:] for n in ("fc1", "fc2")} for i in (0, 1)]).to(dtype)
    base = {f"{name}.weight": torch.zeros(delta.shape[1:], dtype=dtype) for name, delta in deltas.items()}
    models = {str(t): {f"{n}.weight": d[t].to(dtype) for n, d in deltas.items()} for t in range(3)}
    inputs = {str(t): {n.replace(".", "/"): x[t].to(dtype) for n, x in rows.items()} for t in range(3)}
    forward = lambda module, batch: module(**batch)
    merged = esm(module, base, models, inputs, forward=forward, batch_size=11).merged
    for name, tensor in wanted.items():
        limit = 1e-11 if dtype == torch.float64 else 1e-4 * float(tensor.abs().max())
        torch.testing.assert_close(merged[f"{name}.weight"].double(), tensor, rtol=0, atol=limit)


def problem(tasks=3, seed=0):
    torch.manual_seed(seed)
    layers = [nn.Linear(6, 9), nn.Tanh(), nn.ModuleDict({"out_proj": nn.Linear(9, 9)}), nn.Linear(9, 6)]
    module = nn.Sequential(*layers)
    module.forward = None

    def forward(model, x):
        return model[3](model[2]["out_proj"](model[1](model[0](x))))

    base = {name: t.clone() for name, t in module.state_dict().items()}
    models = {str(t): {n: w + 0.1 * torch.randn_like(w) for n, w in base.items()} for t in range(tasks)}
    inputs = {str(t): torch.randn(20, 6) for t in range(tasks)}
    return module, base, models, inputs, {"forward": forward}


def test_projections_after_attention_are_tsv_merged_and_vectors_averaged():
    module, base, models, inputs, shared = problem()
    merged = esm(module, base, models, inputs, alpha=0.5, **shared).merged
    name = "2.out_proj.weight"
    update = tsv_m(torch.stack([model[name] - base[name] for model in models.values()]))
    torch.testing.assert_close(merged[name], base[name] + 0.5 * update.float())
    mean = torch.stack([model["0.bias"] - base["0.bias"] for model in models.values()]).mean(0)
    torch.testing.assert_close(merged["0.bias"], base["0.bias"] + 0.5 * mean)


def test_the_order_of_tasks_and_the_batches_do_not_matter_and_models_stay_unchanged():
    module, base, models, inputs, shared = problem()
    before = {name: t.clone() for name, t in models["1"].items()}
    one = esm(module, base, models, inputs, **shared).merged
    turned = {task: models[task] for task in reversed(models)}
    two = esm(module, base, turned, inputs, batch_size=7, **shared).merged
    for name in base:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)
    assert all(torch.equal(before[name], models["1"][name]) for name in before)
    assert all(torch.equal(base[name], tensor) for name, tensor in module.state_dict().items())


def test_unmoved_models_give_the_base_and_an_unmoved_task_no_null_directions():
    module, base, models, inputs, shared = problem()
    unmoved = esm(module, base, dict.fromkeys(models, base), inputs, **shared).merged
    assert all(torch.allclose(unmoved[name], base[name]) for name in base)
    mixed = {**models, "2": base}
    found = [esm(module, base, mixed, {**inputs, "2": x}, **shared).merged for x in (inputs["2"], 3 * inputs["2"])]
    assert all(torch.equal(found[0][name], found[1][name]) for name in base)


def test_bad_input_is_refused_in_one_line():
    module, base, models, inputs, shared = problem()
    with pytest.raises(DataError, match=r"Task '0': the inputs of '0.weight' are not finite"):
        esm(module, base, models, {**inputs, "0": inputs["0"] * torch.nan}, **shared)
    with pytest.raises(ConfigError, match="inputs lack '2'"):
        esm(module, base, models, {"0": inputs["0"], "1": inputs["1"]}, **shared)
    with pytest.raises(SutureError, match="shape"):
        esm(module, base, {**models, "1": {**models["1"], "0.bias": torch.zeros(3)}}, inputs, **shared)
