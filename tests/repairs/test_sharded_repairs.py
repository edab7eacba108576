"""Repairs and scores of networks whose weights are split over processes: what one process finds, in a part of it."""

from functools import partial

import pytest
import torch
from teams import processes, repaired
from torch import nn

from suture import evaluate, repair
from suture.checkpoints import open_checkpoint, save_checkpoint
from suture.core.fabric import Team, launch
from suture.core.sharding import is_sharded, local
from suture.core.unread import unread_copy
from suture.errors import ConfigError
from suture.evaluation import TaskInputs
from suture.repairs.anchored import LayerSums

NUMBERS = [2, pytest.param(4, marks=pytest.mark.slow)]
TASKS = ("a", "b", "c")
KINDS = [
    ("final", {"steps": 4}),
    ("deep", {"steps": 4, "batch_size": 3}),
    ("deep", {"steps": 2, "fit": "layerwise"}),
    ("calibrate", {}),
    ("calibrate", {"num_passes": 2}),
]


def llama():
    from transformers import LlamaConfig, LlamaModel

    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 40}
    return LlamaModel(LlamaConfig(vocab_size=31, **sizes)).double().eval()


def vit():
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 40}
    return ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4)).double().eval()


def feature(module, inputs):
    if isinstance(inputs, dict):
        states = module(**inputs, use_cache=False).last_hidden_state
        return states[torch.arange(len(states)), inputs["attention_mask"].sum(1) - 1]
    return module(inputs).last_hidden_state[:, 0]


def inputs_for(make, count, seed):
    generator = torch.Generator().manual_seed(seed)
    if make is vit:
        return torch.randn(count, 3, 8, 8, generator=generator).double()
    mask = (torch.arange(6) < torch.randint(2, 7, (count, 1), generator=generator)).long()
    return {"input_ids": torch.randint(31, (count, 6), generator=generator), "attention_mask": mask}


@pytest.fixture
def problem(request, tmp_path):
    """A merged module and a loader of experts, all in mapped files; inputs of each task; and the base."""
    make = request.param
    torch.manual_seed(0)
    base = {name: tensor.clone() for name, tensor in make().state_dict().items()}
    for name in ("merged", *TASKS):
        noise = 0.02 if name == "merged" else 0.2
        tensors = {key: t + noise * torch.randn_like(t) if t.is_floating_point() else t for key, t in base.items()}
        save_checkpoint(tensors, tmp_path / f"{name}.safetensors")

    def load(name):
        module = make()
        module.load_state_dict(dict(open_checkpoint(tmp_path / f"{name}.safetensors")), assign=True)
        return module

    return load, {task: inputs_for(make, 9 + i, i) for i, task in enumerate(TASKS)}, base, inputs_for(make, 5, 9)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(("kind", "knobs"), KINDS)
@pytest.mark.parametrize("problem", [llama, vit], indirect=True)
def test_processes_with_a_part_each_repair_transformers_as_one_does(problem, kind, knobs, number):
    load, inputs, base, others = problem

    def work(fabric):
        merged = load("merged")
        result = repair(merged, load, inputs, kind, forward=feature, encode_batch=4, base=base, fabric=fabric, **knobs)
        with torch.no_grad():
            return result.losses, torch.stack([result.model.for_task(task)(others) for task in TASKS]), result.warnings

    one, several = work(None), launch(processes(number, "fsdp"), work)
    torch.testing.assert_close(several[0], one[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(several[1], one[1], rtol=0, atol=1e-10)
    assert several[2] == one[2]
    with torch.no_grad():
        assert (feature(load("merged"), others) - one[1]).abs().max() > 1e-4


@pytest.mark.parametrize("problem", [llama], indirect=True)
def test_each_process_runs_a_network_of_which_it_has_a_part(problem):
    load, inputs, _, _ = problem

    def shares(fabric):
        seen = set()

        def watched(module, rows):
            parts = [p for name, p in module.named_parameters() if name.startswith("layers.")]
            seen.add((all(map(is_sharded, parts)), sum(local(p).numel() for p in parts)))
            return feature(module, rows)

        repair(load("merged"), load, inputs, "final", forward=watched, steps=1, fabric=fabric)
        return Team(fabric).gather(seen)

    whole = sum(p.numel() for name, p in load("merged").named_parameters() if name.startswith("layers."))
    (first, *_), (second, *_) = launch(processes(2, "fsdp"), shares)
    assert first[0]
    assert second[0]
    assert first[1] + second[1] == whole
    assert first[1] <= 0.51 * whole


@pytest.mark.parametrize("strategy", ["ddp_fork", "fsdp"])
@pytest.mark.parametrize("problem", [llama], indirect=True)
def test_processes_share_the_equations_of_a_block(problem, strategy, monkeypatch):
    load, inputs, base, _ = problem
    factor = LayerSums._factor

    def solved(fabric):
        seen = []
        monkeypatch.setattr(LayerSums, "_factor", lambda self, *given: seen.append(given[0]) or factor(self, *given))
        repair(load("merged"), load, inputs, "calibrate", forward=feature, base=base, fabric=fabric)
        return Team(fabric).gather(len(seen))

    (alone,), several = solved(None), launch(processes(2, strategy), solved)
    assert alone == 3 * 4  # attention's three in one, its output, and the two widths of the MLP, in each block
    assert sum(several) == alone
    assert min(several) > 0


@pytest.mark.parametrize(("kind", "knobs"), [("deep", {"steps": 3}), ("calibrate", {"num_passes": 2})])
@pytest.mark.parametrize("problem", [llama], indirect=True)
def test_models_whose_weights_are_unread_are_repaired_like_those_in_memory(problem, kind, knobs, tmp_path):
    load, inputs, base, others = problem

    def unread(name):
        module, state = load(name), open_checkpoint(tmp_path / f"{name}.safetensors")
        return unread_copy(module, {id(p): partial(state.__getitem__, n) for n, p in module.named_parameters()})

    def work(fabric):
        given = unread if fabric else load
        knows = {"forward": feature, "base": base, "fabric": fabric, "cache": tmp_path / f"cache{bool(fabric)}"}
        result = repair(given("merged"), given, inputs, kind, **knows, **knobs)
        if kind == "deep":
            return result.losses
        with torch.no_grad():
            return result.model(others)

    torch.testing.assert_close(launch(processes(2, "fsdp"), work), work(None), rtol=0, atol=1e-10)


@pytest.mark.parametrize("problem", [llama], indirect=True)
def test_a_calibrated_model_in_a_file_is_saved_like_any_other(problem, tmp_path):
    load, inputs, base, _ = problem

    def work(fabric):
        knobs = {"forward": feature, "base": base, "fabric": fabric, "cache": tmp_path / "cache"}
        result = repair(load("merged"), load, inputs, "calibrate", **knobs)
        if Team(fabric).rank == 0:
            result.model.save(tmp_path / f"{Team(fabric).world}.safetensors")
        return None

    work(None)
    launch(processes(2, "fsdp"), work)
    one, two = (open_checkpoint(tmp_path / f"{number}.safetensors") for number in (1, 2))
    assert list(one) == list(two)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-11)
    before = open_checkpoint(tmp_path / "merged.safetensors")
    assert (before["layers.0.mlp.up_proj.weight"] - one["layers.0.mlp.up_proj.weight"]).abs().max() > 1e-3
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("problem", [llama, vit], indirect=True)
def test_processes_with_a_part_each_score_transformers_as_one_does(problem):
    load, inputs, _, _ = problem
    tasks = {task: TaskInputs(task, rows, torch.arange(9 + i) % 24) for i, (task, rows) in enumerate(inputs.items())}
    score = lambda fabric: evaluate(load("merged"), tasks, batch_size=4, forward=feature, fabric=fabric)
    experts = lambda fabric: evaluate({t: load(t) for t in TASKS}, tasks, batch_size=4, forward=feature, fabric=fabric)
    for work in (score, experts):
        assert launch(processes(2, "fsdp"), work) == work(None)


def test_what_needs_whole_weights_in_each_process_is_refused():
    with pytest.raises(ConfigError, match=r"^fabric\.strategy=fsdp with repair=distil, which needs whole weights"):
        launch(processes(2, "fsdp"), lambda fabric: repaired("distil", {"steps": 1}, fabric))
    with pytest.raises(ConfigError, match=r"^fabric\.strategy=fsdp with BatchNorm: calibration measures it"):
        launch(processes(2, "fsdp"), lambda fabric: repaired("calibrate", {}, fabric, norm=nn.BatchNorm1d))
