"""`method=adamerging` on the command line: what it leaves, coefficients given, kills, and bad input."""

import csv
import json
import os

import numpy as np
import pytest
import torch
from desk import refused
from safetensors.torch import load_file

from suture.checkpoints import open_checkpoint
from suture.cli.main import main

QUICK = ["method.max_steps=4", "method.batch_size=4"]


def weights(folder):
    return {name: tensor.clone() for name, tensor in open_checkpoint(folder / "model" / "model.safetensors").items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_leaves_coefficients_history_logs_and_figures(desk):
    assert main(desk.words(*QUICK, "method.eval_iterations=2", method="adamerging")) == 0
    out = desk.folder / "out"
    report = json.loads((out / "report.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["pretrained", "experts", "layer_wise_adamerging"]
    learned = report["learning"]["layer_wise_adamerging"]
    assert learned["steps"] == 4
    assert list(learned["scores"]) == ["2", "4"]
    history = load_file(out / "history.safetensors")
    assert history["coefficients"].shape == (5, 2, len(learned["layers"]))
    assert history["coefficients"][-1].tolist() == learned["coefficients"]
    content = torch.load(out / "merging_weights.pt", weights_only=True)
    assert content["tasks"] == ["first", "second"]
    with (out / "logs" / "layer_wise_adamerging" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"]
    assert float(rows[-1]["train/loss"]) == pytest.approx(learned["losses"][-1])
    assert float(rows[-1]["train/weight_max"]) == pytest.approx(history["coefficients"][-1].max().item())
    figures = {path.stem for path in (out / "figures").glob("*.png")}
    assert figures == {
        "accuracy",
        "coefficients_layer_wise_adamerging",
        "coefficients_over_steps_layer_wise_adamerging",
        "objective_over_steps_layer_wise_adamerging",
        "accuracy_over_steps_layer_wise_adamerging",
    }
    assert {"forward pass", "backward pass", "merging weights", "test-time adaptation"} <= set(
        report["profile_seconds"]
    )


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("clip_task_wise_adamerging", (2,)),
        ("tw_adamergingpp", (2,)),
        ("lw_adamergingpp", (2, 39)),
    ],
)
def test_every_name_stands_for_its_granularity(desk, name, shape):
    words = desk.words("method.max_steps=1", method=name)
    if name.startswith("clip"):
        words = desk.words("method.max_steps=1", f"method.name={name}", method="adamerging")
    assert main(words) == 0
    coefficients = load_file(desk.folder / "out" / "coefficients.safetensors")["coefficients"]
    assert coefficients.shape == shape


def test_plus_plus_starts_at_ties_to_the_last_bit(desk):
    assert main(desk.words("method.max_steps=0", method="lw_adamergingpp")) == 0
    adapted = weights(desk.folder / "out")
    assert main(desk.words("overwrite=true", method="ties_merging")) == 0
    assert same(adapted, weights(desk.folder / "out"))


def test_no_steps_at_equal_coefficients_are_task_arithmetic_to_the_last_bit(desk):
    assert main(desk.words("method.max_steps=0", method="adamerging")) == 0
    adapted = weights(desk.folder / "out")
    assert main(desk.words("overwrite=true", method="task_arithmetic")) == 0
    assert same(adapted, weights(desk.folder / "out"))


@pytest.mark.parametrize("suffix", ["pt", "safetensors", "npy", "list"])
def test_given_coefficients_skip_the_adaptation(desk, suffix):
    assert main(desk.words(*QUICK, method="adamerging")) == 0
    out, learned = desk.folder / "out", weights(desk.folder / "out")
    coefficients = load_file(out / "coefficients.safetensors")["coefficients"]
    np.save(desk.folder / "given.npy", coefficients.numpy())
    given = {
        "pt": out / "merging_weights.pt",
        "safetensors": out / "coefficients.safetensors",
        "npy": desk.folder / "given.npy",
        "list": json.dumps(coefficients.tolist()),
    }[suffix]
    words = desk.words(f"method.weights={given}", "output=again", method="adamerging")
    assert main([word if "taskpool" not in word else "taskpool=null" for word in words]) == 0
    assert same(learned, weights(desk.folder / "again"))


@pytest.mark.parametrize("words", [["fast_dev_run=true"], ["method.fast_dev_run=true"]])
def test_a_fast_dev_run_takes_three_steps(desk, words):
    assert main(desk.words("method.batch_size=4", *words, method="adamerging")) == 0
    assert (
        json.loads((desk.folder / "out" / "report.json").read_text())["learning"]["layer_wise_adamerging"]["steps"] == 3
    )


def test_the_seed_decides_the_order_of_the_inputs(desk):
    found = []
    for seed in (0, 0, 1):
        assert main(desk.words(*QUICK, f"seed={seed}", "overwrite=true", method="adamerging")) == 0
        found.append(load_file(desk.folder / "out" / "history.safetensors")["coefficients"])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("strategy", ["auto", "fsdp"])
def test_two_processes_learn_what_one_learns(desk, strategy):
    for number in (1, 2):
        fabric = [f"fabric.devices={number}", *([f"fabric.strategy={strategy}"] if number == 2 else [])]
        assert main(desk.words(*QUICK, *fabric, f"output=out{number}", method="adamerging")) == 0
    one, two = (load_file(desk.folder / f"out{n}" / "history.safetensors")["coefficients"] for n in (1, 2))
    torch.testing.assert_close(two, one, rtol=0, atol=1e-4)
    assert (desk.folder / "out2" / "logs" / "layer_wise_adamerging" / "metrics.csv").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method.objective=expert_kl"], "an objective of experts' outputs: each process has only a part"),
        (["method.eval_iterations=2"], "eval_iterations: each process has only a part"),
    ],
)
def test_what_cannot_be_sharded_is_refused_before_any_work(desk, capsys, monkeypatch, words, message):
    from suture.families.clip import Clip

    monkeypatch.setattr(Clip, "decode", lambda *a, **k: pytest.fail("decoded"))
    assert message in refused(
        capsys, desk.words(*words, "fabric.strategy=fsdp", "fabric.devices=2", method="adamerging")
    )


def test_bad_input_is_refused_in_one_line_before_anything_is_decoded(desk, capsys, monkeypatch):
    from suture.families.clip import Clip

    monkeypatch.setattr(Clip, "decode", lambda *a, **k: pytest.fail("decoded"))
    words = lambda *more, **kind: desk.words(*more, method=kind.get("method", "adamerging"))
    np.save(desk.folder / "short.npy", np.full((1, 39), 0.3))
    os.makedirs(desk.folder / "d", exist_ok=True)
    for word, message in [
        ("method.weights=short.npy", "shape (1, 39), but 2 tasks and 39 layers need the shape (2, 39)"),
        ("method.weights=none.pt", "there is no such file"),
        ("method.init_values=[0.1,0.2,0.3]", "need the shape (2, 39)"),
        ("method.lr=-1", "method.lr=-1 does not fit adamerging"),
        ("method.optimizer=adan", "method.optimizer='adan' does not fit adamerging"),
        ("method.granularity=block_wise", "method.granularity='block_wise' does not fit"),
        ("method.granularity=[nowhere]", "the pattern 'nowhere' is in no tensor's name"),
        ("method.name=lw_adamergin", "Did you mean 'lw_adamerging'"),
        ("method.max_step=3", "Did you mean 'method.max_steps'"),
        ("fabric.precision=bf17", "Unknown fabric.precision 'bf17'"),
        ("fabric.strategy=ddp_spawn", "fabric.strategy=ddp_spawn: a run cannot be handed to a new process"),
        ("fabric.loggers.kind=wandbb", "Unknown fabric.loggers.kind 'wandbb'"),
        ("fabric.device=2", "Did you mean 'fabric.devices'"),
        ("seed=-1", "seed=-1: wanted a whole number, 0 or more"),
    ]:
        assert message in refused(capsys, words(word)), word


def test_a_model_without_a_task_is_refused(desk, capsys):
    del desk.tasks["second"]
    assert "Model 'second' has no task of its name" in refused(capsys, desk.words(method="adamerging"))
    words = [word for word in desk.words(method="adamerging") if not word.startswith("taskpool")]
    assert "Model 'first' has no task of its name" in refused(capsys, words)


def test_tensorboard_reads_what_was_logged(desk):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = [*QUICK, "fabric.loggers.kind=tensorboard", "fabric.loggers.root_dir=tb", "fabric.loggers.name=mine"]
    assert main(desk.words(*words, method="adamerging")) == 0
    events = EventAccumulator(str(desk.folder / "tb" / "mine"))
    events.Reload()
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == [0, 1, 2, 3]
    report = json.loads((desk.folder / "out" / "report.json").read_text())
    wanted = report["learning"]["layer_wise_adamerging"]["losses"]
    assert [event.value for event in losses] == pytest.approx(wanted, rel=1e-5)


def test_pictures_are_learned_from_with_channels_last_where_the_keys_say_so(desk, monkeypatch):
    seen, forward = [], torch.nn.Conv2d.forward

    def watched(self, input):
        if torch.is_grad_enabled():
            seen.append(input.is_contiguous(memory_format=torch.channels_last))
        return forward(self, input)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", watched)
    words = ["method.max_steps=2", "method.batch_size=4"]
    assert main(desk.words(*words, "fabric.channels_last=true", method="lw_adamerging")) == 0
    assert seen
    assert all(seen)
    seen.clear()
    assert main(desk.words(*words, "output=plain", method="lw_adamerging")) == 0
    assert not all(seen)
