"""A backbone with its modules: tasks by name, row or router; files; export."""

import copy
import warnings

import pytest
import torch
from torch import nn

import suture
from suture.errors import CheckpointError, ConfigError, IncompatibleModels
from suture.fusionbench.surgery import SurgeryModelWrapper
from suture.repairs import SurgeryModel, fit_router, repair
from suture.repairs.network import FINAL

TASKS = ("cars", "digits", "birds")


def tower(seed=0):
    torch.manual_seed(seed)
    blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True) for _ in range(2))
    return Tower(blocks, nn.Linear(8, 5))


class Tower(nn.Module):
    def __init__(self, blocks, head):
        super().__init__()
        self.blocks, self.head = blocks, head

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


def repaired(kind, variant="standard", steps=40):
    module, experts = tower(), {task: tower(i + 1) for i, task in enumerate(TASKS)}
    torch.manual_seed(5)
    inputs = {task: torch.randn(20, 6, 8) + 2 * i for i, task in enumerate(TASKS)}
    model = repair(module, experts, inputs, kind, steps=steps, lr=0.02, rank=3, variant=variant).model
    return model, module, inputs


@pytest.fixture(params=["final", "deep"])
def made(request):
    return repaired(request.param)


def test_tasks_by_row_are_tasks_by_name(made):
    model, _, inputs = made
    x = torch.cat([rows[:4] for rows in inputs.values()])
    by_name = torch.cat([model(rows[:4], task) for task, rows in inputs.items()])
    rows = torch.arange(3).repeat_interleave(4)
    torch.testing.assert_close(model(x, rows), by_name)
    turned = torch.randperm(12)
    torch.testing.assert_close(model(x[turned], rows[turned]), by_name[turned])
    assert not torch.allclose(model(x, "cars"), by_name)


def test_the_router_chooses_where_no_task_is_given(made):
    model, _, inputs = made
    with pytest.raises(ConfigError, match="No task was given and the model has no router"):
        model(inputs["cars"])
    model.router = fit_router({task: model.encode(rows) for task, rows in inputs.items()}, kind="linear")
    x = inputs["birds"]
    assert (model.route(model.encode(x)) == 2).float().mean() > 0.5
    torch.testing.assert_close(model(x), model(x, model.route(model.encode(x))))


def test_an_unknown_task_is_refused(made):
    with pytest.raises(ConfigError, match=r"Unknown task 'card'.*Did you mean 'cars'"):
        made[0](made[2]["cars"], "card")


@pytest.mark.parametrize("kind", ["final", "deep"])
@pytest.mark.parametrize("variant", ["standard", "centred"])
@pytest.mark.parametrize("routed", [None, "linear", "centroids"])
def test_the_modules_alone_are_saved_and_come_back_beside_the_backbone(tmp_path, kind, variant, routed):
    model, module, inputs = repaired(kind, variant, steps=3)
    if routed:
        model.router = fit_router({task: model.encode(rows) for task, rows in inputs.items()}, kind=routed)
    path = tmp_path / "repair.safetensors"
    model.save(path)
    assert path.stat().st_size < 12_000
    loaded = SurgeryModel.load(path, module)
    assert (loaded.kind, loaded.tasks, loaded.layers) == (model.kind, model.tasks, model.layers)
    for task, rows in inputs.items():
        assert torch.equal(loaded(rows, task), model(rows, task))
        assert not routed or torch.equal(loaded(rows), model(rows))


def test_files_and_backbones_that_do_not_fit_are_refused(tmp_path):
    model, module, inputs = repaired("deep", steps=1)
    model.save(tmp_path / "repair.safetensors")
    suture.save_checkpoint({"w": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="holds no surgery modules"):
        SurgeryModel.load(tmp_path / "other.safetensors", module)
    with pytest.raises(IncompatibleModels, match=r"has no block 'blocks.0'"):
        SurgeryModel.load(tmp_path / "repair.safetensors", nn.Linear(2, 2))
    repaired("final", steps=1)[0].save(tmp_path / "final.safetensors")
    narrow = SurgeryModel.load(tmp_path / "final.safetensors", Tower(module.blocks, nn.Linear(8, 4)))
    with pytest.raises(IncompatibleModels, match="features of width 4, a surgery module takes 5"):
        narrow(inputs["cars"], "cars")


def test_the_backbone_s_parameters_are_shared_and_its_module_is_untouched(made):
    model, module, _ = made
    assert model.network.module.head.weight.data_ptr() == module.head.weight.data_ptr()
    model.train().requires_grad_(True)
    assert not any(part._forward_hooks for part in module.modules())
    assert module.training
    assert all(p.grad is None for p in module.parameters())


def test_a_copy_works_by_itself(made):
    model, _, inputs = made
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.repairs[0].up.zero_()
    assert not torch.equal(twin(inputs["cars"], "cars"), model(inputs["cars"], "cars"))
    assert torch.equal(copy.deepcopy(model)(inputs["cars"], "cars"), model(inputs["cars"], "cars"))


def test_the_model_of_one_task_is_exported_with_equal_outputs(made):
    model, _, inputs = made
    single, x = model.for_task("digits"), inputs["digits"]
    torch.testing.assert_close(single(x), model(x, "digits"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export speaks of its own deprecations
        program = torch.export.export(single, (x[:4],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(x), model(x, "digits"))


def test_the_model_of_one_task_runs_as_onnx_with_equal_outputs(made, tmp_path):
    import onnxruntime

    model, _, inputs = made
    single, x = model.for_task("digits"), inputs["digits"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = {0: torch.export.Dim("batch")}
        program = torch.onnx.export(single, (x[:4],), dynamo=True, verbose=False, dynamic_shapes=(batch,))
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), model(x, "digits"), rtol=1e-4, atol=1e-5)


def test_the_wrapper_has_the_interface_of_fusion_bench():
    backbone = nn.Linear(3, 512)
    wrapper, x = SurgeryModelWrapper(backbone, ["cars", "digits"]), torch.randn(4, 3)
    down, up = wrapper.collect_trainable_params()[2:]
    assert (down.shape, up.shape) == ((1, 16, 512), (1, 512, 16))
    with torch.no_grad():
        up.normal_()
    after, before, correction = wrapper.compute_surgery_features(lambda model: model(x), "digits")
    assert torch.equal(before, backbone(x))
    torch.testing.assert_close(correction, (before @ down[0].T).relu() @ up[0].T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after, before - correction)
    of_features = wrapper.compute_surgery_features(before, "digits")
    assert all(map(torch.equal, of_features, (after, before, correction)))
    assert all(map(torch.equal, wrapper(x, "digits"), (after, correction, before)))
    assert torch.equal(wrapper(x), before)
    assert torch.equal(wrapper(input=x), before)
    with pytest.raises(ConfigError, match="Unknown dataset 'digit'"):
        wrapper(x, "digit")
    with pytest.raises(ConfigError, match="has a module for 'cars' already"):
        wrapper.add_surgery_module("cars")


def test_an_adam_over_all_of_the_wrapper_moves_only_the_dataset_in_use():
    wrapper = SurgeryModelWrapper(nn.Linear(3, 8), ["cars", "digits"], projection_dim=8, hidden_dim=2)
    adam = torch.optim.Adam(wrapper.collect_trainable_params())
    for task in ("cars", "digits"):
        before = [p.detach().clone() for p in wrapper.collect_trainable_params()]
        features, _, _ = wrapper.compute_surgery_features(lambda model: model(torch.ones(4, 3)), task)
        adam.zero_grad()
        features.square().sum().backward()
        adam.step()
        moved = [not torch.equal(p, b) for p, b in zip(wrapper.collect_trainable_params(), before, strict=True)]
        assert moved[1::2] == [task == "cars", task == "digits"]


def test_the_repaired_model_is_evaluated_like_any_other():
    model, _, inputs = repaired("final")
    task = suture.TaskInputs("cars", inputs["cars"], torch.zeros(20, dtype=torch.long))
    assert 0 <= suture.evaluate(model.for_task("cars"), task).value <= 1
    assert model.layers == (FINAL,)
