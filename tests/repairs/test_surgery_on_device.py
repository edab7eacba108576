"""Surgery's steps on an accelerator: batches drawn there, losses read in blocks, steps recorded and replayed.

Without a GPU the CPU stands in: it is told to keep what it is given, and a recorded step repeats its function.
"""

import logging

import pytest
import torch
from recorders import ON_GPU, StandIn
from torch import nn

from suture.core.progress import Profile
from suture.errors import DataError
from suture.repairs import Problem, deep, final, repair, resident
from suture.repairs.fitting import Descent, constant_losses, descend
from suture.repairs.modules import SurgeryModules
from suture.repairs.network import FINAL
from suture.storage.resume import Resume

pytestmark = pytest.mark.device
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
KINDS = [("final", {}), ("deep", {"blocks": ["1"]}), ("deep", {"blocks": ["1"], "concatenate": False})]
PLENTY = 1 << 40


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 5)).double().to(DEVICE)


def given(sizes=(40, 30, 50)):
    experts = {f"t{i}": network(i + 1) for i in range(3)}
    torch.manual_seed(0)
    return network(), experts, {task: torch.randn(n, 6).double() for task, n in zip(experts, sizes, strict=True)}


def fitted(kind, options, steps=9, **more):
    return repair(*given(), kind, steps=steps, lr=0.01, rank=3, batch_size=8, **options, **more)


def same(one, other):
    assert torch.equal(one.losses, other.losses)
    assert one.active == other.active
    assert one.passes == other.passes
    for mine, its in zip(one.model.repairs.parameters(), other.model.repairs.parameters(), strict=True):
        assert torch.equal(mine, its)


@pytest.fixture
def room(monkeypatch):
    """Sets the free memory of the device, in bytes; None for a CPU."""
    return lambda free: monkeypatch.setattr(resident, "free_memory", lambda device: free)


@pytest.fixture
def recorder(monkeypatch):
    """The stand-in, or on a GPU its own graphs; of the final repair with so many steps in each."""

    def use(fault=0.0, launch=4):
        stand_in = StandIn(fault)
        monkeypatch.setattr(final, "_LAUNCH", launch)
        if not ON_GPU:
            monkeypatch.setattr("suture.repairs.captured.recorder_on", lambda device: stand_in)
        return stand_in

    return use


@pytest.mark.parametrize("optimizer", ["adam", "shared_adam", "shared_adam_pairs"])
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_batches_drawn_on_the_device_give_the_same_bits(kind, options, optimizer, room):
    room(None)
    sent = fitted(kind, options, optimizer=optimizer)
    room(PLENTY)
    same(fitted(kind, options, optimizer=optimizer), sent)


def test_the_positions_of_many_steps_are_sent_in_one_copy(room, monkeypatch):
    room(PLENTY)
    copies = []
    monkeypatch.setattr(resident, "sent", lambda block, device: copies.append(tuple(block.shape)) or block.to(device))
    fitted("final", {}, steps=300)
    assert copies == [(256, 3, 8), (44, 3, 8)]


@pytest.mark.parametrize("free", [0, 4 * (40 + 30 + 50) * 2 * 5 * 8 - 1, PLENTY])
def test_what_takes_more_than_a_quarter_of_the_free_memory_is_sent_batch_by_batch(room, monkeypatch, free):
    room(free)
    copies = []
    monkeypatch.setattr(resident, "sent", lambda block, device: copies.append(0) or block.to(device))
    fitted("final", {})
    assert len(copies) == (free == PLENTY)


def test_texts_of_different_lengths_run_as_they_are(room):
    room(PLENTY)
    module, experts, _ = given()
    inputs = {task: torch.randn(20, 2 + i, 6).double() for i, task in enumerate(experts)}
    mean = lambda module, tokens: module(tokens.to(DEVICE)).mean(1)
    run = lambda: repair(module, experts, inputs, "deep", steps=4, blocks=["1"], forward=mean)
    kept = run()
    room(None)
    same(kept, run())


def descent_on(rows, batches, **options):
    modules = SurgeryModules(["a"], 4, 2, dtype=torch.float64).to(DEVICE)
    losses = constant_losses(modules, slice(0, 1), [rows[:, None]], [rows + 1], batches)
    descent = Descent([modules], [slice(0, 1)], 0.1, "adam")
    return descend(descent, 10, losses, {FINAL: modules}, **options)


def test_losses_are_read_in_blocks_and_at_the_end():
    events = []
    batches = lambda step: events.append("step") or [torch.arange(3)]
    seen = lambda step, losses, modules: events.append((step, float(losses)))
    rows = torch.randn(3, 4, dtype=torch.float64)
    history = descent_on(rows, batches, read_every=4, on_step=seen)
    told = [(step, float(loss)) for step, (loss,) in enumerate(history)]
    assert events == [*["step"] * 4, *told[:4], *["step"] * 4, *told[4:8], *["step"] * 2, *told[8:]]
    assert torch.equal(history, descent_on(rows, batches))


@pytest.mark.parametrize("read_every", [1, 4, 100])
def test_a_loss_that_is_not_finite_is_refused_with_its_step(read_every, tmp_path):
    rows = torch.randn(8, 4, dtype=torch.float64)
    rows[7] = torch.nan
    state = Resume(tmp_path / "state.pt", {}, every=1000)
    with pytest.raises(DataError, match="loss is nan at step 5"):
        descent_on(rows, lambda step: [torch.tensor([(step + 2) % 8])], read_every=read_every, resume=state)
    assert state.load() is None


def test_on_an_accelerator_steps_are_told_in_blocks_as_long_as_asked_for():
    module, experts, inputs = given()
    far = Problem(module, experts, inputs, on_step=print, look_every=25)
    assert far.read_every == (25 if ON_GPU else 1)
    assert Problem(module, experts, inputs).read_every == (100 if ON_GPU else 1)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_replayed_steps_give_the_same_repair(kind, options, recorder):
    stand_in, plain = recorder(), fitted(kind, options)
    replayed = fitted(kind, options, capture=True)
    torch.testing.assert_close(replayed.losses, plain.losses, rtol=0, atol=1e-12)
    assert replayed.active == plain.active
    if not ON_GPU:
        same(replayed, plain)
        steps = 2 if kind == "final" else 9  # two launches of four, and a plain step
        assert (stand_in.recorded, stand_in.replayed) == (1, 1 + steps)  # and the comparison


def test_the_profile_says_that_steps_were_replayed(recorder):
    recorder()
    profile = Profile()
    final.final(Problem(*given(), profile=profile), steps=3, capture=True)
    deep.deep(Problem(*given()), steps=3, blocks=["1"])
    assert list(profile.seconds) == ["repair steps as a CUDA graph"]


class Killed(Exception):
    pass


@pytest.mark.parametrize("launch", [1, 5, 20])
def test_any_number_of_steps_a_launch_gives_the_same_repair(launch, recorder):
    recorder(launch=launch)
    replayed, plain = fitted("final", {}, capture=True), fitted("final", {})
    torch.testing.assert_close(replayed.losses, plain.losses, rtol=0, atol=1e-12)
    if not ON_GPU:
        same(replayed, plain)


@pytest.mark.parametrize("at", [0, 3, 7])
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_a_killed_loop_of_replayed_steps_goes_on_to_the_same_bits(kind, options, at, recorder, tmp_path):
    recorder()
    state = lambda: Resume(tmp_path / "state.pt", {}, every=0)

    def kill(step, losses, modules):
        if step == at:
            raise Killed

    with pytest.raises(Killed):
        fitted(kind, options, capture=True, resume=state(), on_step=kill)
    resumed = fitted(kind, options, capture=True, resume=state())
    whole = fitted(kind, options, capture=True)
    assert torch.equal(resumed.losses, whole.losses)
    assert resumed.active == whole.active
    for one, other in zip(resumed.model.repairs.parameters(), whole.model.repairs.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(ON_GPU, reason="a graph that replays wrongly is the stand-in's")
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_a_recording_that_differs_is_not_used(kind, options, recorder, caplog):
    plain = fitted(kind, options)
    recorder(fault=0.01)
    with caplog.at_level(logging.WARNING):
        same(fitted(kind, options, capture=True), plain)
    assert f"repair={kind} runs without a CUDA graph: a replayed step is off by " in caplog.text


def test_a_network_that_cannot_be_recorded_runs_plainly(monkeypatch, caplog):
    def refuse(function):
        function()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr("suture.repairs.captured.recorder_on", lambda device: refuse)
    plain = fitted("deep", {"blocks": ["1"]})
    with caplog.at_level(logging.WARNING):
        kept = fitted("deep", {"blocks": ["1"]}, capture=True)
    torch.testing.assert_close(kept.losses, plain.losses, rtol=0, atol=0 if not ON_GPU else 1e-12)
    assert "repair=deep runs without a CUDA graph: operation not permitted" in caplog.text


@pytest.mark.parametrize("options", [{}, {"optimizer": "shared_adam"}], ids=str)
def test_what_cannot_be_recorded_says_so_and_runs_plainly(options, recorder, caplog):
    if options:
        recorder()
    elif ON_GPU:
        pytest.skip("a GPU records")
    with caplog.at_level(logging.WARNING):
        kept = fitted("final", options, capture=True)
    same(kept, fitted("final", options))
    reason = "takes the tasks' steps one after another" if options else "it needs a GPU"
    assert reason in caplog.text
