"""`suture.plan`: what a job will read, pass and write, against what it then does."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import suture
from suture.cli.main import main
from suture.core.batches import size
from suture.core.names import in_bytes
from suture.errors import ConfigError
from suture.pipeline.context import Context
from suture.repairs.problem import Problem


@pytest.fixture
def passes(monkeypatch):
    """Counts of inputs that go through an encoder: without and with a gradient."""
    counted = {False: 0, True: 0}
    original = nn.Module.__call__

    def call(self, *inputs, **more):
        if type(self).__name__.endswith(("VisionEncoder", "Encoder")) and hasattr(self, "load"):
            counted[torch.is_grad_enabled()] += size(inputs[0])
        return original(self, *inputs, **more)

    monkeypatch.setattr(nn.Module, "__call__", call)
    return counted


def counted(passes, job):
    passes[False] = passes[True] = 0
    job()
    return passes[False], passes[True]


def test_a_static_run_passes_reads_and_writes_what_was_planned(desk, passes):
    plan = suture.plan(desk.words())
    forward, backward = counted(passes, lambda: suture.run(desk.words()))
    assert (forward, backward) == (plan.forward, plan.backward) == (12 * 2 * 3, 0)
    written = suture.open_checkpoint(desk.folder / "out" / "model")
    assert plan.bytes_written == sum(s.nbytes for name, s in written.specs.items() if name not in written.aliases)
    hashed, _, merge = plan.stages[:3]
    assert hashed.bytes_read == sum(p.stat().st_size for p in map(_path, desk.models.values()))
    assert merge.bytes_read == suture.check(desk.words()).bytes_read


def _path(name):
    path = Path(name)
    return path / "model.safetensors" if path.is_dir() else path


def test_a_run_with_modules_passes_what_was_planned(desk, passes):
    def beyond(compare):
        words = desk.words("repair=final", "repair.steps=3", f"repair.compare={compare}", f"output=out{compare}")
        plan = suture.plan(words)
        return counted(passes, lambda: suture.run(words))[0] - plan.forward

    probes = beyond(5)  # single inputs, from which blocks and widths are found
    assert 0 <= probes <= 8
    assert beyond(3) == probes
    assert beyond(0) == 0


def test_features_of_other_inputs_are_encoded_for_scoring(desk, passes):
    words = desk.words("repair=final", "repair.steps=3", "repair.compare=0", "repair.split=train")
    plan = suture.plan(words)
    forward, _ = counted(passes, lambda: suture.run(words))
    assert forward == plan.forward


def test_a_calibration_passes_what_was_planned(desk, monkeypatch):
    problems = []
    original = Problem.__post_init__
    monkeypatch.setattr(Problem, "__post_init__", lambda self: (problems.append(self), original(self))[1])
    words = desk.words("repair=calibrate", method="task_arithmetic")
    plan = suture.plan(words)
    suture.run(words)
    fitted = next(stage for stage in plan.stages if stage.name == "repair=calibrate")
    assert fitted.forward == sum(p.passes.merged + p.passes.experts for p in problems)


def test_an_adaptation_passes_what_was_planned(desk, monkeypatch):
    taken = []
    original = Context.watch

    def watch(self, name, steps, resume, **more):
        taken.append(steps)
        return original(self, name, steps, resume, **more)

    monkeypatch.setattr(Context, "watch", watch)
    words = desk.words("method.max_steps=5", "method.batch_size=4", method="adamerging")
    plan = suture.plan(words)
    suture.run(words)
    assert plan.backward == taken[0] * 2 * 4 == 40
    assert plan.on(2) < plan.on(1)


def test_a_device_with_a_part_of_the_weights_holds_less_and_gathers_the_rest(desk):
    words = desk.words("method.max_steps=5", "method.batch_size=4", "fabric.accelerator=cpu", method="adamerging")
    parts = [*words, "fabric.strategy=fsdp", "fabric.devices=2"]
    whole, split, apart = map(suture.plan, (words, parts, [*parts, "method.concatenate=false"]))
    checked = suture.check(words)
    fixed = lambda plan: plan.memory - plan.slopes.host
    network = checked.bytes_written  # is built once, where whole models would be loaded twice
    assert fixed(whole) - fixed(split) == checked.memory - checked.memory // 2 + network
    assert split.backward == whole.backward == 40
    assert whole.left_out == ()
    for plan, passes in ((split, 5), (apart, 10)):  # weights before and after, and gradients, of the other half
        size = in_bytes(passes * (3 * checked.parameters * 4 // 2))
        assert plan.left_out == (f"gathering weights and adding up gradients: {size} to each of 2 devices",)


def test_an_evaluation_passes_what_was_planned(desk, passes):
    words = desk.words()[1:3]
    plan = suture.plan(words, verb="evaluate", matrix=True)
    forward, _ = counted(passes, lambda: suture.evaluate_pool(words, matrix=True))
    assert forward == plan.forward == 24 * 4


def test_a_search_passes_what_was_planned(desk, passes):
    words = desk.words(method="task_arithmetic")
    over = {"scaling_factor": [0.1, 0.2, 0.3]}
    plan = suture.plan(words, verb="search", over=over, searching={"num_inputs": 7})
    forward, _ = counted(passes, lambda: suture.search(words, over=over, num_inputs=7))
    assert forward == plan.forward == 14 * 4 + 72


def test_slopes_are_measured_once(desk, monkeypatch):
    first = suture.plan(desk.words())
    monkeypatch.setattr("suture.pipeline.slopes._measured", lambda *arguments: pytest.fail("measured again"))
    assert suture.plan(desk.words()).slopes == first.slopes


def test_a_part_that_is_not_counted_is_named(desk):
    plan = suture.plan(desk.words("repair=deep", "repair.steps=2"))
    assert plan.left_out == ("fitting repair=deep",)
    assert "without  fitting repair=deep" in str(plan)


def test_the_command_line_plans_and_does_nothing(desk, capsys):
    assert main(["run", *desk.words(), "--plan"]) == 0
    assert "hash the models" in capsys.readouterr().out
    assert not (desk.folder / "out").exists()
    assert main(["evaluate", *desk.words()[1:3], "--plan", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stages"][1]["forward"] == 48
    assert main(["search", *desk.words("method.scaling_factor=0.1,0.2", method="task_arithmetic"), "--plan"]) == 0
    assert "search: 2 points" in capsys.readouterr().out


def test_a_plan_refuses_what_the_job_would(desk):
    with pytest.raises(ConfigError, match="verb"):
        suture.plan(desk.words(), verb="fly")
    assert main(["run", *desk.words("method.scaling_factor=0.1,0.2"), "-m", "--plan"]) == 2
