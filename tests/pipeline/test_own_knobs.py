"""`method.NAME.knob=value` and `repair.KIND.knob=value`: knobs of one among several of a sweep."""

import json
import shlex

import pytest
from desk import refused

from suture.cli.main import main


def sweep_words(desk, *words, method="ties_merging,task_arithmetic"):
    given = [word for word in desk.words(*words, method=method) if word != "output=out"]
    return ["-m", *given, "hydra.sweep.dir=sweep"]


def run_of(desk, job):
    return json.loads((desk.folder / "sweep" / str(job) / "report.json").read_text())


def test_a_knob_of_one_method_leaves_the_others_at_their_defaults(desk):
    assert main(sweep_words(desk, "method.ties_merging.scaling_factor=0.7", "method.ties_merging.threshold=50")) == 0
    ties, plain = run_of(desk, 0), run_of(desk, 1)
    assert (ties["config"]["method"]["scaling_factor"], ties["config"]["method"]["threshold"]) == (0.7, 50)
    assert plain["config"]["method"]["scaling_factor"] == 0.3
    assert [run["config"]["choices"]["method"] for run in (ties, plain)] == ["ties_merging", "task_arithmetic"]


def test_the_command_of_such_a_run_is_that_of_the_method_alone(desk):
    assert main(sweep_words(desk, "method.ties_merging.scaling_factor=0.7")) == 0
    words = shlex.split(run_of(desk, 0)["command"])
    assert words[1:3] == ["method=ties_merging", "method.scaling_factor=0.7"]
    assert "scaling_factor" not in run_of(desk, 1)["command"]


def test_they_can_be_given_for_a_single_run_and_by_an_alias(desk):
    assert main(desk.words("method.lw_adamerging.max_steps=2", method="lw_adamerging")) == 0
    report = json.loads((desk.folder / "out" / "report.json").read_text())
    assert report["config"]["method"]["max_steps"] == 2


def test_a_knob_of_a_repair_is_that_of_every_chain_with_it(desk):
    few = ["repair.calibrate.num_inputs=6", "repair.affine.num_inputs=5"]
    words = sweep_words(desk, "repair=none,affine,calibrate+affine", *few, method="task_arithmetic")
    assert main(words) == 0
    repairs = [run_of(desk, job)["config"]["repair"] for job in range(3)]
    assert repairs[1]["num_inputs"] == 5
    assert (repairs[2]["calibrate"]["num_inputs"], repairs[2]["affine"]["num_inputs"]) == (6, 5)
    assert "repair.num_inputs=5" in run_of(desk, 1)["command"]
    assert "repair.calibrate.num_inputs=6 repair.affine.num_inputs=5" in run_of(desk, 2)["command"]


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("method.tsv_m.alpha=2", "method= does not name tsv_m"),
        ("method.ties_merging.treshold=2", "method.ties_merging.threshold"),
        ("method.ties_merging.scaling_factor=0.1,0.2", "wanted one value"),
        ("method.ties_merging.scaling_factor=[", "cannot be read"),
        ("method.ties_merging.threshold=-3", "threshold"),
        ("repair.final.steps=3", "repair= does not name final"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_run(desk, capsys, word, wanted):
    assert wanted in refused(capsys, sweep_words(desk, word))
    assert not (desk.folder / "sweep").exists()


def test_a_knob_given_twice_is_refused(desk, capsys):
    words = sweep_words(desk, "method.scaling_factor=0.3", "method.ties_merging.scaling_factor=0.7")
    assert "also given for ties_merging alone" in refused(capsys, words)
