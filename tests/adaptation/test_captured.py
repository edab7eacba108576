"""Steps that are recorded and replayed: without a GPU by a stand-in, which repeats the function on the same memory."""

import logging

import pytest
import torch
from adaptation_problem import network, problem
from recorders import ON_GPU, StandIn
from torch import nn

from suture.adaptation import adapt, captured
from suture.core.progress import Profile

pytestmark = pytest.mark.device
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture
def recorder(monkeypatch):
    """Buffers and the stand-in, or on a GPU its own graphs."""

    def use(fault=0.0):
        stand_in = StandIn(fault)
        monkeypatch.setattr("suture.adaptation.merged_model.in_buffers", lambda device: True)
        if not ON_GPU:
            monkeypatch.setattr("suture.adaptation.adamerging.recorder_for", lambda *facts: stand_in)
        return stand_in

    return use


def learned(arguments, **options):
    module, *rest = arguments
    return adapt(module.to(DEVICE), *rest, max_steps=7, lr=0.1, **options)


@pytest.mark.parametrize("options", [{}, {"concatenate": False}, {"micro_batch": 2}, {"granularity": "task"}], ids=str)
def test_replayed_steps_give_the_same_trajectory(options, recorder):
    stand_in = recorder()
    plain = learned(problem(torch.float64), **options)
    profile = Profile()
    replayed = learned(problem(torch.float64), capture=True, profile=profile, **options)
    torch.testing.assert_close(replayed.history, plain.history, rtol=0, atol=1e-12)
    torch.testing.assert_close(replayed.losses, plain.losses, rtol=0, atol=1e-12)
    assert "steps as a CUDA graph" in profile.seconds
    if not ON_GPU:
        assert (stand_in.recorded, stand_in.replayed) == (1, 5)  # steps 4 to 7, and the comparison


def test_inputs_of_other_shapes_run_plainly_in_between(recorder):
    stand_in = recorder()
    module, base, models, batches = problem(torch.float64)
    uneven = {task: [*given, given[0][:2]] for task, given in batches.items()}
    plain = learned((module, base, models, uneven))
    replayed = learned((module, base, models, uneven), capture=True)
    torch.testing.assert_close(replayed.history, plain.history, rtol=0, atol=1e-12)
    if not ON_GPU:
        assert (stand_in.recorded, stand_in.replayed) == (1, 3)  # at step 4; then at steps 5 and 7


@pytest.mark.skipif(ON_GPU, reason="a graph that replays wrongly is the stand-in's")
def test_a_recording_that_differs_is_not_used(recorder, caplog):
    recorder(fault=0.01)
    plain = learned(problem(torch.float64))
    with caplog.at_level(logging.WARNING):
        kept = learned(problem(torch.float64), capture=True)
    assert torch.equal(kept.history, plain.history)
    assert "without a CUDA graph: a replayed step is off by 1.0e-02" in caplog.text


def test_a_network_that_cannot_be_recorded_runs_plainly(recorder, monkeypatch, caplog):
    recorder()

    class Looks(nn.Sequential):
        def forward(self, x):
            return super().forward(x) * (2.0 if float(x.sum()) > 0 else 1.0)

    def refuse(function):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    if not ON_GPU:
        monkeypatch.setattr("suture.adaptation.adamerging.recorder_for", lambda *facts: refuse)
    build = lambda: Looks(*network())
    plain = learned(problem(torch.float64, build=build))
    with caplog.at_level(logging.WARNING):
        kept = learned(problem(torch.float64, build=build), capture=True)
    torch.testing.assert_close(kept.history, plain.history, rtol=0, atol=1e-12)
    assert "AdaMerging runs without a CUDA graph: " in caplog.text


@pytest.mark.skipif(ON_GPU, reason="a GPU records")
def test_without_a_gpu_it_says_so_and_runs_plainly(caplog):
    with caplog.at_level(logging.WARNING):
        learned(problem(), capture=True)
    assert "without a CUDA graph: it needs one GPU" in caplog.text


def test_what_is_not_in_buffers_compares_or_draws_is_not_recorded(caplog):
    class Model(captured.MergedModel):
        device = torch.device("cuda")
        separate = {}  # noqa: RUF012

        def __init__(self):
            pass

    model = Model()
    with caplog.at_level(logging.WARNING):
        assert captured.recorder_for(model, False, True) is not None
        assert captured.recorder_for(model, True, True) is None
        assert captured.recorder_for(model, False, False) is None
        model.__class__.separate = {"w": None}
        assert captured.recorder_for(model, False, True) is None
    assert [line.partition("graph: ")[2].split(" ")[0] for line in caplog.messages] == ["the", "the", "task"]
