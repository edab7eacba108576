"""How adaptation runs: cut into passes, streamed, as factors, taken up again, in several processes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adaptation_problem import problem
from torch import nn

from suture.adaptation import adapt
from suture.adaptation import network as forward
from suture.adaptation.passes import passes
from suture.adaptation.vectors import Held, LowRank
from suture.core.batches import ShuffledBatches
from suture.core.fabric import launch, make_fabric
from suture.core.progress import Profile
from suture.errors import ConfigError
from suture.storage.resume import Resume


@pytest.mark.parametrize("concatenate", [True, False])
@pytest.mark.parametrize("micro_batch", [1, 2, 4, 7])
def test_micro_batches_give_the_same_trajectory(micro_batch, concatenate):
    whole = adapt(*problem(torch.float64), max_steps=5, lr=0.1)
    cut = adapt(*problem(torch.float64), max_steps=5, lr=0.1, micro_batch=micro_batch, concatenate=concatenate)
    torch.testing.assert_close(cut.history, whole.history, rtol=0, atol=1e-12)
    torch.testing.assert_close(cut.losses, whole.losses, rtol=0, atol=1e-12)


def test_on_a_cpu_a_large_network_goes_task_by_task_unless_asked_otherwise(monkeypatch):
    monkeypatch.setattr(forward, "LARGE_ON_CPU", 50)  # the problem's network has 59 parameters
    module, *rest = problem()
    sizes = []
    module.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    for asked, wanted in ((None, [3, 3, 3]), (True, [9])):
        sizes.clear()
        adapt(module, *rest, max_steps=1, concatenate=asked)
        assert sizes == wanted


@pytest.mark.parametrize("objective", ["expert_cross_entropy", "expert_feature_l1"])
def test_micro_batches_of_expert_objectives_give_the_same_trajectory(objective):
    options = {"max_steps": 4, "lr": 0.1, "objective": objective}
    whole, cut = (adapt(*problem(torch.float64), **options, micro_batch=m) for m in (None, 2))
    torch.testing.assert_close(cut.history, whole.history, rtol=0, atol=1e-12)


def test_micro_batches_are_refused_where_the_batch_matters():
    build = lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))
    module, *rest = problem(build=build)
    with pytest.raises(ConfigError, match=r"micro_batch=2: '1' normalises by the statistics of the batch"):
        adapt(module.train(), *rest, micro_batch=2)
    with pytest.raises(ConfigError, match=r"micro_batch=0: wanted 1 or more"):
        adapt(*problem(), micro_batch=0)


def test_a_pass_holds_no_more_than_asked_for_and_shares_add_up():
    inputs = {"a": torch.ones(5, 2), "b": torch.ones(3, 2), "c": torch.ones(4, 9)}
    for world in (1, 2, 3):
        found = [p for r in range(world) for p in passes(inputs, concatenate=True, micro_batch=2, rank=r, world=world)]
        assert all(sum(len(part.inputs) for part in p) <= 2 for p in found)
        assert all(len({part.inputs.shape[1] for part in p}) == 1 for p in found)
        for task in inputs:
            assert sum(part.share for p in found for part in p if part.task == task) == pytest.approx(1.0)


def test_tasks_that_cannot_be_cut_go_to_processes_whole():
    inputs = {"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2)}
    shared = [passes(inputs, concatenate=False, independent=False, rank=r, world=2) for r in (0, 1)]
    assert [[part.task for p in found for part in p] for found in shared] == [["a", "c"], ["b"]]


@pytest.mark.parametrize("plus_plus", [True, False])
def test_streamed_task_vectors_give_the_same_bits(plus_plus):
    options = {"max_steps": 4, "lr": 0.1, "plus_plus": plus_plus}
    held, streamed = (adapt(*problem(), **options, stream_vectors=s) for s in (False, True))
    assert torch.equal(held.history, streamed.history)
    assert all(torch.equal(held.merged[name], streamed.merged[name]) for name in held.merged)


def test_factors_do_what_their_products_do(generator):
    up, down = (torch.randn(3, *shape, generator=generator, dtype=torch.float64) for shape in ((5, 2), (2, 7)))
    base, gradient = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    column = torch.tensor([0.3, -1.0, 0.5], dtype=torch.float64)
    dense, factors = Held((up @ down).flatten(1)), LowRank(up, down)
    torch.testing.assert_close(factors.combine(base, column), dense.combine(base, column))
    torch.testing.assert_close(factors.products(gradient), dense.products(gradient))


class Killed(Exception):
    pass


def seekable(batches):
    return {task: ShuffledBatches(torch.cat(found), 4, seed=1, name=task) for task, found in batches.items()}


@pytest.mark.parametrize("streams", [seekable, lambda batches: batches], ids=["seekable", "replayed"])
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_a_killed_loop_goes_on_to_the_same_bits(tmp_path, optimizer, streams):
    module, base, models, batches = problem()
    options = {"max_steps": 12, "lr": 0.1, "optimizer": optimizer}
    whole = adapt(module, base, models, streams(batches), **options)
    for kill in (0, 1, 4, 7, 11):
        run = lambda **more: adapt(
            module, base, models, streams(batches), **options, **more, resume=Resume(tmp_path / "state", {}, every=0)
        )

        def stop(step, loss, values, kill=kill):
            if step == kill:
                raise Killed

        with pytest.raises(Killed):
            run(on_step=stop)
        seen = []
        again = run(on_step=lambda step, loss, values, seen=seen: seen.append(step))
        assert seen == list(range(kill + 1, 12))
        assert torch.equal(again.history, whole.history)
        assert torch.equal(again.losses, whole.losses)
        assert all(torch.equal(again.merged[name], whole.merged[name]) for name in whole.merged)
        (tmp_path / "state").unlink()


def test_a_killed_loop_with_dropout_goes_on_to_the_same_bits(tmp_path):
    build = lambda: nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 4))
    module, base, models, batches = problem(build=build)
    run = lambda **more: adapt(module.train(), base, models, batches, max_steps=6, lr=0.1, **more)
    torch.manual_seed(3)
    whole = run()

    def stop(step, loss, values):
        if step == 3:
            raise Killed

    torch.manual_seed(3)
    with pytest.raises(Killed):
        run(on_step=stop, resume=Resume(tmp_path / "state", {}, every=0))
    torch.manual_seed(99)
    assert torch.equal(run(resume=Resume(tmp_path / "state", {})).history, whole.history)


def test_the_merged_module_can_be_looked_at_on_the_way():
    module, base, models, batches = problem()
    seen = {}
    look = lambda step, merged: seen.update({step: merged.state_dict()["0.weight"].clone()})
    result = adapt(module, base, models, batches, max_steps=7, lr=0.1, eval_iterations=3, on_evaluation=look)
    plain = adapt(module, base, models, batches, max_steps=7, lr=0.1)
    assert torch.equal(result.history, plain.history)
    assert list(seen) == [3, 6]
    assert torch.equal(seen[6], adapt(module, base, models, batches, max_steps=6, lr=0.1).merged["0.weight"])


def test_the_profile_has_the_rows_that_people_know():
    profile = Profile()
    adapt(*problem(), max_steps=2, profile=profile)
    assert list(profile.seconds) == [
        "construct the wrapped model",
        "test-time adaptation",
        "data loading",
        "merging weights",
        "forward pass",
        "backward pass",
        "optimizer step",
    ]


@pytest.mark.parametrize("number", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "options", [{}, {"concatenate": False}, {"micro_batch": 1}, {"objective": "expert_cross_entropy"}]
)
def test_several_processes_find_what_one_finds(options, number):
    from lightning_fabric import Fabric

    one = adapt(*problem(torch.float64), max_steps=4, lr=0.1, **options)
    fabric = Fabric(accelerator="cpu", devices=number, strategy="ddp_fork")
    two = launch(fabric, lambda f: adapt(*problem(torch.float64), max_steps=4, lr=0.1, fabric=f, **options))
    torch.testing.assert_close(two.history, one.history, rtol=0, atol=1e-12)
    torch.testing.assert_close(two.losses, one.losses, rtol=0, atol=1e-12)


def test_processes_that_each_run_the_whole_script_leave_one_to_go_on(tmp_path):
    script = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from adaptation_problem import problem
from lightning_fabric import Fabric
from suture.adaptation import adapt
from suture.core.fabric import launch, make_fabric

fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
result = launch(fabric, lambda f: adapt(*problem(torch.float64), max_steps=4, lr=0.1, fabric=f))
print(f"process {fabric.global_rank} goes on")
torch.save(result.history, sys.argv[2])
"""
    (tmp_path / "script.py").write_text(script)
    command = [
        sys.executable,
        tmp_path / "script.py",
        Path(__file__).parent.parent / "support",
        tmp_path / "history.pt",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines() == ["process 0 goes on"]
    one = adapt(*problem(torch.float64), max_steps=4, lr=0.1)
    torch.testing.assert_close(torch.load(tmp_path / "history.pt"), one.history, rtol=0, atol=1e-12)


@pytest.mark.parametrize("buffers", [False, True], ids=["tensor by tensor", "in buffers"])
def test_half_precision_learns_from_the_weights_of_each_step(buffers, monkeypatch):
    monkeypatch.setattr("suture.adaptation.merged_model.in_buffers", lambda device: buffers)
    fabric = lambda: make_fabric({"accelerator": "cpu", "precision": "bf16-mixed"})
    options = {"max_steps": 8, "lr": 0.1, "concatenate": False}
    exact, near = (
        adapt(*problem(build=Attention), **options),
        adapt(*problem(build=Attention), fabric=fabric(), **options),
    )
    fall = exact.losses[0] - exact.losses[-1]
    assert fall > 0.3
    torch.testing.assert_close(near.losses, exact.losses, rtol=0, atol=0.1 * fall.item())


class Attention(nn.Module):
    """Weights that autocast converts inside of linear layers, and outside of any."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.last = nn.Linear(6, 4)

    def forward(self, x):
        rows = torch.stack([x, x.flip(-1), x.roll(1, -1)], dim=1)
        return self.last(self.attention(rows, rows, rows)[0].mean(1))


def test_half_precision_passes_stay_near_and_others_are_refused():
    from lightning_fabric import Fabric

    exact = adapt(*problem(), max_steps=4, lr=0.02)
    near = adapt(*problem(), max_steps=4, lr=0.02, fabric=Fabric(accelerator="cpu", devices=1, precision="bf16-mixed"))
    torch.testing.assert_close(near.history, exact.history, rtol=0, atol=0.05)
    assert not torch.equal(near.losses, exact.losses)
    with pytest.raises(ConfigError, match=r"fabric.precision=64-true: wanted one of 32-true, bf16-mixed"):
        adapt(*problem(), max_steps=1, fabric=Fabric(accelerator="cpu", devices=1, precision="64-true"))


def test_a_process_that_has_used_a_gpu_is_not_forked(monkeypatch):
    from lightning_fabric import Fabric

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp_fork")
    with pytest.raises(ConfigError, match=r"cannot be forked. Remedy: fabric.strategy=ddp"):
        launch(fabric, lambda f: None)
