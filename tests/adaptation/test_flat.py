"""Merged weights in buffers, as on an accelerator: the same trajectory as tensor by tensor, in fewer operations."""

import pytest
import torch
from adaptation_problem import network, problem
from torch import nn
from torch.profiler import ProfilerActivity, profile

from suture.adaptation import adapt
from suture.adaptation.flat import BLOCK, exact_products
from suture.adaptation.merged_model import MergedModel
from suture.adaptation.options import AdaMergingOptions
from suture.adaptation.vectors import task_vector_rows
from suture.core.fabric import make_fabric
from suture.merging.task_vectors import open_task_vectors
from suture.storage.resume import Resume

pytestmark = pytest.mark.device
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wide():
    """Tensors of several blocks, of less than one, and of one exactly."""
    return nn.Sequential(nn.Linear(6, 700), nn.Tanh(), nn.Linear(700, 32), nn.LayerNorm(32), nn.Linear(32, 32))


@pytest.fixture
def buffers(monkeypatch):
    """Switches buffers on, as a device does."""
    return lambda: monkeypatch.setattr("suture.adaptation.merged_model.in_buffers", lambda device: True)


OPTIONS = [
    {},
    {"granularity": "task"},
    {"granularity": ["0", "2"]},
    {"micro_batch": 2},
    {"concatenate": False},
    {"plus_plus": True},
    {"softmax": True},
    {"objective": "expert_cross_entropy"},
    {"objective": "expert_feature_l1"},
    {"stream_vectors": True},
]


@pytest.mark.parametrize("concatenate", [True, False])
def test_a_gpu_finds_what_the_cpu_finds(concatenate, buffers):
    """Without a GPU the buffers are on the CPU."""
    module, *rest = problem(torch.float64, build=wide)
    plain = adapt(module, *rest, max_steps=4, lr=0.1, concatenate=concatenate)
    buffers()
    there = adapt(module.to(DEVICE), *rest, max_steps=4, lr=0.1, concatenate=concatenate)
    torch.testing.assert_close(there.history, plain.history, rtol=0, atol=1e-9)
    again = adapt(module, *rest, max_steps=4, lr=0.1, concatenate=concatenate)
    assert torch.equal(again.history, there.history)


@pytest.mark.parametrize("build", [network, wide])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_buffers_give_the_same_trajectory(options, build, buffers):
    arguments = problem(torch.float64, build=build)
    plain = adapt(*arguments, max_steps=4, lr=0.1, **options)
    buffers()
    flat = adapt(*arguments, max_steps=4, lr=0.1, **options)
    torch.testing.assert_close(flat.history, plain.history, rtol=0, atol=1e-12)
    torch.testing.assert_close(flat.losses, plain.losses, rtol=0, atol=1e-12)
    for name, tensor in plain.merged.items():
        torch.testing.assert_close(flat.merged[name], tensor, rtol=0, atol=1e-12)


def test_buffers_stay_near_in_float32_and_with_task_vectors_in_bf16(buffers):
    arguments = problem(build=wide)
    plain = [adapt(*arguments, max_steps=3, lr=0.1, vectors_dtype=dtype) for dtype in (None, torch.bfloat16)]
    buffers()
    flat = [adapt(*arguments, max_steps=3, lr=0.1, vectors_dtype=dtype) for dtype in (None, torch.bfloat16)]
    for one, other in zip(plain, flat, strict=True):
        torch.testing.assert_close(other.history, one.history, rtol=0, atol=1e-4)


def test_equal_coefficients_merge_to_the_same_bits(buffers):
    arguments = problem(build=wide)
    plain = adapt(*arguments, max_steps=0)
    buffers()
    flat = adapt(*arguments, max_steps=0)
    assert all(torch.equal(flat.merged[name], tensor) for name, tensor in plain.merged.items())


def test_batch_norm_and_tied_weights_keep_their_places(buffers):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.second = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)
            self.second.weight = self.first.weight

        def forward(self, inputs):
            return self.second(self.norm(self.first(inputs)))

    arguments = problem(torch.float64, build=Tied)
    for state in (arguments[1], *arguments[2].values()):
        state["second.weight"] = state["first.weight"]
    plain = adapt(*arguments, max_steps=3, lr=0.1)
    buffers()
    flat = adapt(*arguments, max_steps=3, lr=0.1)
    torch.testing.assert_close(flat.history, plain.history, rtol=0, atol=1e-12)
    assert flat.merged["second.weight"] is flat.merged["first.weight"]


def test_a_killed_loop_goes_on_to_the_same_bits(tmp_path, buffers):
    buffers()
    arguments = problem(build=wide)
    whole = adapt(*arguments, max_steps=6, lr=0.1)
    state = Resume(tmp_path / "state.pt", {"work": "1"})

    def killed(step, loss, values):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adapt(*arguments, max_steps=6, lr=0.1, resume=state, on_step=killed)
    resumed = adapt(*arguments, max_steps=6, lr=0.1, resume=Resume(tmp_path / "state.pt", {"work": "1"}))
    assert torch.equal(resumed.history, whole.history)
    assert torch.equal(resumed.losses, whole.losses)


def test_weights_written_in_bf16_change_nothing_but_are_full_where_they_are_looked_at(buffers):
    arguments = problem(build=wide)
    fabric = lambda: make_fabric({"precision": "bf16-mixed", "accelerator": "cpu"})
    seen = []

    def look(step, module):
        seen.append({name: tensor.clone() for name, tensor in module.state_dict().items()})
        return float(step)

    options = {"max_steps": 3, "lr": 1e-3, "eval_iterations": 1, "on_evaluation": look}
    plain = adapt(*arguments, fabric=fabric(), **options)
    buffers()
    flat = adapt(*arguments, fabric=fabric(), **options)
    torch.testing.assert_close(flat.losses, plain.losses, rtol=1e-2, atol=0)
    assert flat.scores == plain.scores == {1: 1.0, 2: 2.0, 3: 3.0}
    for one, other in zip(seen[:3], seen[3:], strict=True):
        assert all(other[name].dtype == tensor.dtype == torch.float32 for name, tensor in one.items())
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-2)


def merged_model(flat):
    module, base, models, batches = problem(build=wide)
    vectors = open_task_vectors(base, models)
    model = MergedModel(module, vectors, task_vector_rows(vectors, AdaMergingOptions()), flat=flat)
    return model, next(iter(batches.values()))[0]


@pytest.mark.parametrize("half", [False, True])
def test_only_what_autocast_converts_is_written_in_bf16(half):
    with torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False):
        model, inputs = merged_model(True)
        model.write(torch.full((3, len(model.names)), 0.3, dtype=torch.float64))
        dtypes = {name: tensor.dtype for name, tensor in model.module.named_parameters()}
        plain, _ = merged_model(False)
        plain.write(torch.full((3, len(model.names)), 0.3, dtype=torch.float64))
        found = [outputs_and_gradient(each, inputs) for each in (model, plain)]
        for one, other in zip(*found, strict=True):
            assert (one - other).abs().max() <= (2e-2 if half else 1e-5) * other.abs().max()
    assert {name for name, dtype in dtypes.items() if dtype == torch.bfloat16} == (
        {f"{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")} if half else set()
    )


def outputs_and_gradient(model, inputs):
    with model.collecting():
        outputs = model.module(inputs)
        model.backward(outputs.square().sum())
        return outputs.detach(), model.gradient()


def operators(model, inputs):
    """The operators of one step outside the network."""
    coefficients = torch.rand(3, len(model.names), dtype=torch.float64)
    with model.collecting():
        model.write(coefficients)
        model.backward(model.module(inputs).square().sum())
        with profile(activities=[ProfilerActivity.CPU]) as found:
            model.write(coefficients)
            model.gradient()
    return sum(event.count for event in found.key_averages() if event.key.startswith("aten::"))


def test_the_operators_of_a_step_do_not_grow_with_the_number_of_tensors():
    class Many(nn.Module):
        def __init__(self, count):
            super().__init__()
            self.layers = nn.Sequential(*(nn.Linear(6, 6) for _ in range(count)))

        def forward(self, inputs):
            return self.layers(inputs)

    def count(layers, flat):
        module, base, models, batches = problem(build=lambda: Many(layers))
        vectors = open_task_vectors(base, models)
        model = MergedModel(module, vectors, task_vector_rows(vectors, AdaMergingOptions()), flat=flat)
        return operators(model, next(iter(batches.values()))[0])

    few, many = count(2, True), count(40, True)
    each = (many - few) / 76  # tensors more: only views, and the copies of their gradients, which are one launch
    assert each < 8
    assert count(40, False) / 80 > 2 * each


def test_every_tensor_begins_at_a_block_of_its_own():
    model, _ = merged_model(True)
    (group,) = model._flat
    offsets = [(tensor.data_ptr() - group.merged.data_ptr()) // 4 for tensor in model.targets]
    assert all(offset % BLOCK == 0 for offset in offsets)
    assert len(set(offsets)) == len(offsets)


def test_tf32_and_autocast_are_off_for_the_merge_and_back_on_after_it():
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = True
    try:
        with torch.autocast("cpu", torch.bfloat16):
            with exact_products(torch.device("cpu")):
                assert not matmul.allow_tf32
                assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        assert matmul.allow_tf32
    finally:
        matmul.allow_tf32 = before


def convolutional():
    """Kernels of several blocks, of less than one, and of one row and column."""
    layers = nn.Conv2d(3, 24, 5), nn.ReLU(), nn.Conv2d(24, 4, 2), nn.Conv2d(4, 4, 1), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(36, 4))


def with_channels_last(module):
    for part in module:
        if isinstance(part, nn.Conv2d):
            part.weight.data = part.weight.data.contiguous(memory_format=torch.channels_last)
    return module


@pytest.mark.parametrize("options", [{}, {"granularity": "task"}, {"vectors_dtype": torch.bfloat16}], ids=str)
def test_kernels_with_channels_last_stay_so_in_buffers(options, buffers):
    module, *rest = problem(torch.float64, build=convolutional, shape=(3, 8, 8))
    seen = []
    forward = lambda module, x: seen.append(module[0].weight.stride()) or module(x.to(DEVICE))
    plain = adapt(module, *rest, max_steps=4, lr=0.1, forward=lambda module, x: module(x), **options)
    buffers()
    ordered = with_channels_last(module).to(DEVICE)
    last = adapt(ordered, *rest, max_steps=4, lr=0.1, forward=forward, **options)
    torch.testing.assert_close(last.history, plain.history, rtol=0, atol=1e-9)
    assert set(seen) == {(75, 1, 15, 3)}
    for name, tensor in plain.merged.items():
        torch.testing.assert_close(last.merged[name], tensor, rtol=0, atol=1e-9)
