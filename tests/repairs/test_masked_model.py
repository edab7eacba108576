"""A network that switches its weights: tasks by name, row or router; files."""

import copy

import pytest
import torch
from torch import nn

from suture import MaskedModel, TaskMasks, emr_masks, open_checkpoint, save_checkpoint, tall_masks
from suture.errors import CheckpointError, ConfigError, IncompatibleModels
from suture.repairs import fit_router

TASKS = ("cars", "digits", "birds")


def tower(seed=0, width=5):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, width))


@pytest.fixture(params=[tall_masks, emr_masks])
def made(request):
    base, experts = tower(), {task: tower(i + 1) for i, task in enumerate(TASKS)}
    torch.manual_seed(5)
    inputs = {task: torch.randn(12, 8) + 2 * i for i, task in enumerate(TASKS)}
    return MaskedModel(base, request.param(base, experts)), base, inputs


def loaded(module, weights):
    module = copy.deepcopy(module)
    module.load_state_dict(weights)
    return module.eval()


@torch.no_grad()
def test_a_task_s_model_is_the_module_with_the_task_s_weights(made):
    model, base, inputs = made
    for task, rows in inputs.items():
        expected = loaded(base, model.masks.for_task(task))(rows)
        assert torch.equal(model(rows, task), expected)
        assert torch.equal(model.for_task(task)(rows), expected)
    assert torch.equal(model.encode(inputs["cars"]), loaded(base, model.masks.average())(inputs["cars"]))


def test_tasks_by_row_are_tasks_by_name_and_weights_are_switched_once_a_task(made):
    model, _, inputs = made
    x, rows = torch.cat([part[:4] for part in inputs.values()]), torch.arange(3).repeat_interleave(4)
    by_name = torch.cat([model(part[:4], task) for task, part in inputs.items()])
    turned, before = torch.randperm(12), model.switches
    torch.testing.assert_close(model(x[turned], rows[turned]), by_name[turned])
    assert model.switches == before + 3
    model(inputs["birds"], "birds")
    assert model.switches == before + 3


def test_the_router_chooses_where_no_task_is_given(made):
    model, _, inputs = made
    with pytest.raises(ConfigError, match="No task was given and the model has no router"):
        model(inputs["cars"])
    model.router = fit_router({task: model.encode(rows) for task, rows in inputs.items()}, kind="linear")
    x = torch.cat(list(inputs.values()))
    which = model.route(model.encode(x))
    assert (which == torch.arange(3).repeat_interleave(12)).double().mean() > 0.5
    torch.testing.assert_close(model(x), model(x, which))


def test_an_unknown_task_is_refused(made):
    for ask in (made[0].for_task, lambda task: made[0](made[2]["cars"], task)):
        with pytest.raises(ConfigError, match=r"Unknown task 'card'.*Did you mean 'cars'"):
            ask("card")


def test_the_module_is_unchanged(made):
    model, base, inputs = made
    model(inputs["cars"], "cars")
    assert all(torch.equal(one, two) for one, two in zip(base.parameters(), tower().parameters(), strict=True))
    assert all(not parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("routed", [None, "linear", "centroids"])
def test_masks_and_router_are_saved_and_come_back_beside_the_base(made, tmp_path, routed):
    model, base, inputs = made
    if routed:
        model.router = fit_router({task: model.encode(rows) for task, rows in inputs.items()}, kind=routed)
    model.save(tmp_path / "masks.safetensors")
    again = MaskedModel.load(tmp_path / "masks.safetensors", tower())
    for task, rows in inputs.items():
        assert torch.equal(again(rows, task), model(rows, task))
        assert not routed or torch.equal(again(rows), model(rows))
    assert TaskMasks.load(tmp_path / "masks.safetensors", base).tasks == TASKS


def test_a_module_of_another_architecture_is_refused(made):
    for module in (tower(width=4), nn.Linear(8, 5)):
        with pytest.raises(IncompatibleModels, match=r"in the module \((Sequential|Linear)\).*Remedy"):
            MaskedModel(module, made[0].masks)


ROUTERS = {
    "of another task": {"router/owner": torch.tensor([0, 1, 7])},
    "one owner too few": {"router/owner": torch.tensor([0, 1])},
    "owners that are no numbers of tasks": {"router/owner": torch.ones(3)},
    "no centroids": {"router/centroids": None},
    "more than a router has": {"router/more": torch.ones(3)},
}


@pytest.mark.parametrize("change", ROUTERS.values(), ids=ROUTERS)
def test_a_damaged_router_is_refused(made, tmp_path, change):
    model, base, inputs = made
    model.router = fit_router({task: model.encode(rows) for task, rows in inputs.items()})
    path = tmp_path / "masks.safetensors"
    model.save(path)
    with open_checkpoint(path) as file:
        kept, facts = {**{name: file[name].clone() for name in file}, **change}, dict(file.metadata)
    save_checkpoint({name: tensor for name, tensor in kept.items() if tensor is not None}, path, facts)
    with pytest.raises(CheckpointError, match="the router is damaged"):
        MaskedModel.load(path, base)
    for text in ("{", '"nearest"', "[]", "[" * 100_000):
        save_checkpoint({name: t for name, t in kept.items() if t is not None}, path, {**facts, "router": text})
        with pytest.raises(CheckpointError, match="Unknown router") as caught:
            MaskedModel.load(path, base)
        assert "\n" not in str(caught.value)
