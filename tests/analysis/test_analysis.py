"""Analyses: the numbers by hand, the same from the command line, and a table and a figure of each."""

import csv
import json
import math

import pytest
import torch
from desk import refused
from torch import nn

from suture.analysis import bias, interpolation, landscape, layers, similarity, trimming
from suture.cli.main import main
from suture.errors import ConfigError
from suture.evaluation import TaskInputs
from suture.merging.methods.ties_merging import ties_rows, trim_thresholds
from suture.merging.streams import OneTensor

BASE = {"a.weight": torch.zeros(2, 3), "b": torch.ones(4)}
MODELS = {
    "one": {"a.weight": torch.tensor([[1.0, -2, 0], [3, 0, 0]]), "b": torch.tensor([1.0, 1, 1, 3])},
    "two": {"a.weight": torch.tensor([[1.0, 2, 0], [0, 4, 0]]), "b": torch.tensor([1.0, 1, 1, 0])},
}


def flat(model):
    return torch.cat([(model[name] - BASE[name]).flatten() for name in sorted(BASE)])


def test_similarity_is_that_of_the_whole_vectors():
    found = similarity(BASE, MODELS)
    one, two = map(flat, MODELS.values())
    assert found.values["norm"].tolist() == pytest.approx([one.norm().item(), two.norm().item()])
    assert found.values["cosine"][0, 1].item() == pytest.approx(torch.cosine_similarity(one, two, dim=0).item())
    assert found.values["cosine"].diagonal().tolist() == pytest.approx([1, 1])
    assert [row[0] for row in found.rows] == ["one", "two"]


def test_a_model_that_equals_the_base_is_like_nothing():
    found = similarity(BASE, {"same": BASE, **MODELS})
    assert math.isnan(found.values["cosine"][0, 1])
    assert found.as_data()["rows"][0]["one"] is None


def test_layers_by_hand():
    found = layers(BASE, MODELS)
    assert found.labels["tensors"] == ["a.weight", "b"]
    norms = found.values["norm"]
    assert norms[0].tolist() == pytest.approx([14**0.5, 21**0.5])
    assert norms[1].tolist() == pytest.approx([2, 1])
    assert found.values["conflict"].tolist() == pytest.approx([1 / 6, 1 / 4])
    assert found.values["agreement"].tolist() == pytest.approx([(2 + 0 + 3 + 4) / (1 + 2 + 3 + 1 + 2 + 4), 1 / 3])
    assert found.values["relative"].tolist() == [math.inf, pytest.approx(1.5 / 2)]


def test_the_share_that_survives_is_that_of_ties(generator):
    deltas = torch.randn(3, 500, generator=generator)
    base, models = {"w": torch.zeros(500)}, {str(i): {"w": row} for i, row in enumerate(deltas)}
    found = trimming(base, models, threshold=30)
    statistic = trim_thresholds(OneTensor(deltas), threshold=30)
    kept = deltas.abs() >= statistic.thresholds[:, None]
    assert found.values["kept"][0].tolist() == pytest.approx((kept.sum(1) / 500).tolist())
    agreeing = ties_rows(deltas, statistic._replace(majority=1)) != 0
    assert found.values["lost"].item() == pytest.approx(1 - agreeing.sum().item() / kept.sum().item())
    trimmed = deltas * kept
    both = (trimmed > 0).any(0) & (trimmed < 0).any(0)
    assert found.values["collide"].item() == pytest.approx(both.sum().item() / 500)


def test_scope_tensor_trims_each_tensor_to_its_share():
    base = {"small": torch.zeros(10), "large": torch.zeros(10)}
    model = {"small": torch.arange(1.0, 11) / 100, "large": torch.arange(1.0, 11)}
    whole, each = (trimming(base, {"one": model}, threshold=50, scope=scope) for scope in ("model", "tensor"))
    assert whole.values["kept"][:, 0].tolist() == [
        1.0,
        pytest.approx(0.1),
    ]  # large, small: 11 of 20 as the authors count
    assert each.values["kept"][:, 0].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("analyse", [layers, trimming])
def test_layers_come_in_the_order_of_their_numbers(analyse):
    sizes = {"layers.10.w": 2, "layers.2.w": 3, "embed": 4}
    base = {name: torch.zeros(size) for name, size in sizes.items()}
    found = analyse(base, {"one": {name: torch.arange(1.0, size + 1) for name, size in sizes.items()}})
    assert found.labels["tensors"] == [row[0] for row in found.rows] == ["embed", "layers.2.w", "layers.10.w"]
    if analyse is layers:
        assert [row[1] for row in found.rows] == [4, 3, 2]


class Bend(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(2, 2, bias=False) for _ in range(2)])

    def forward(self, inputs):
        for block in self.blocks:
            inputs = block(inputs)
        return inputs


def state(first, second):
    return {"blocks.0.weight": torch.tensor(first), "blocks.1.weight": torch.tensor(second)}


EYE, SWAP = [[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]


@pytest.fixture
def two_tasks():
    """The base answers one way; each model has learned to swap, by another of its blocks."""
    points = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    tasks = {name: TaskInputs(name, points, torch.tensor([1, 0])) for name in ("one", "two")}
    return state(EYE, EYE), {"one": state(SWAP, EYE), "two": state(EYE, SWAP)}, tasks


def test_interpolation_goes_from_the_base_to_each_model(two_tasks):
    base, models, tasks = two_tasks
    module = Bend()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    found = interpolation(module, base, models, tasks, points=[0.0, 1.0])
    assert found.values["alone"].tolist() == [[0.0, 1.0], [0.0, 1.0]]
    assert found.values["together"].tolist() == [[0.0, 0.0], [0.0, 0.0]]  # two swaps are none
    assert found.rows[1] == (1.0, 0.0, 1.0, 1.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_a_landscape_has_the_models_at_its_corners(two_tasks):
    base, models, tasks = two_tasks
    found = landscape(Bend(), base, models, tasks, points=[0.0, 1.0])
    assert found.values["accuracy"].tolist() == [[[0.0, 1.0], [1.0, 0.0]]] * 2
    with pytest.raises(ConfigError, match="of two models, found 1"):
        landscape(Bend(), base, {"one": models["one"]}, tasks)


def test_bias_is_nothing_for_an_expert_and_grows_from_the_layer_that_differs(two_tasks):
    base, models, _ = two_tasks
    modules = {name: Bend() for name in ("base", "two")}
    modules["base"].load_state_dict(base)
    modules["two"].load_state_dict(models["two"])
    inputs = {"two": torch.tensor([[1.0, 0.0], [0.0, 3.0], [1.0, 2.0]])}
    found = bias(modules["base"], {"two": modules["two"]}, inputs)
    assert found.labels["places"] == ["blocks.0", "blocks.1", "(features)"]
    assert found.values["l1"][0].tolist() == pytest.approx([0, 5 / 3, 5 / 3])
    same = bias(modules["two"], {"two": modules["two"]}, inputs)
    assert same.values["l1"].abs().max() == 0
    assert same.values["cka"].tolist() == [[pytest.approx(1)] * 3]


@pytest.mark.parametrize(
    "words",
    [
        ["similarity"],
        ["layers"],
        ["trimming", "threshold=50", "scope=tensor"],
        ["interpolation", "points=0,1"],
        ["landscape", "points=0,0.5,1", "models=first,second"],
        ["bias"],
    ],
    ids=lambda words: words[0],
)
def test_every_analysis_leaves_a_table_and_a_figure(desk, capsys, words):
    run = desk.words(method="task_arithmetic")
    assert main(["analyse", *words, *run, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    name, folder = words[0], desk.folder / "out"
    assert {path.name for path in folder.iterdir()} == {f"{name}.{kind}" for kind in ("json", "csv", "png", "svg")}
    assert json.loads((folder / f"{name}.json").read_text())["rows"] == told["rows"]
    with (folder / f"{name}.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(told["rows"])
    assert main(["analyse", *words, *run]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_words_that_do_not_fit_an_analysis_are_refused(desk, capsys):
    run = desk.words()
    assert "Did you mean 'layers'" in refused(capsys, ["analyse", "layer", *run])
    assert "threshold" in refused(capsys, ["analyse", "trimming", "threshold=-1", *run])
    assert "option of analyse similarity" in refused(capsys, ["analyse", "similarity", "points=1", *run])
    assert "points" in refused(capsys, ["analyse", "interpolation", "points=a", *run])
    assert "Did you mean 'first'" in refused(capsys, ["analyse", "similarity", "models=firs", *run])
    assert "taskpool" in refused(capsys, ["analyse", "bias", *(w for w in run if not w.startswith("taskpool"))])
    for method in ("lw_adamerging", "tall_masks"):
        assert "it learns, or leaves a model for each task" in refused(
            capsys, ["analyse", "bias", *desk.words(method=method)]
        )
