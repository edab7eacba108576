"""`suture search`: the knobs that score best, the run with them, kills, and bad input."""

import json
import shlex

import pytest
import torch
from desk import refused

import suture
from suture.cli.main import main
from suture.pipeline import searching

SWEEP = ["method.scaling_factor=0.1,0.3,0.9", "num_inputs=12"]


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("score", ["agreement", "entropy", "accuracy"])
def test_the_best_point_is_run_and_the_report_says_how_it_was_chosen(desk, score):
    words = desk.words(*SWEEP, f"score={score}", "split=test", method="task_arithmetic")
    assert main(["search", *words]) == 0
    report = report_of(desk.folder / "out")
    found = report["search"]
    scores = {trial["point"]["scaling_factor"]: trial["score"] for trial in found["trials"]}
    assert list(scores) == [0.1, 0.3, 0.9]
    best = (min if score == "entropy" else max)(scores, key=scores.__getitem__)
    assert report["config"]["method"]["scaling_factor"] == best
    assert found["labels"] == (score == "accuracy")
    row = next(row for row in report["rows"] if row["name"] == "task_arithmetic")
    assert f"scaling_factor={best}: the best of 3 points by {score} on 12 test inputs a task" in row["learned"]
    assert (desk.folder / "out" / "figures" / "search.png").is_file()
    if score == "accuracy":  # all 12 test inputs, so that the score is the accuracy of the run
        assert scores[best] == pytest.approx(row["mean"])


def test_the_command_that_repeats_a_search_is_that_of_the_best_run(desk, capsys, monkeypatch):
    words = desk.words("method.scaling_factor=0.15..0.85", "trials=4", "split=test", method="task_arithmetic")
    assert main(["search", *words]) == 0
    report = report_of(desk.folder / "out")
    best = report["config"]["method"]["scaling_factor"]
    assert f"Best of 4 points: method.scaling_factor={best:.4g}" in capsys.readouterr().out
    monkeypatch.chdir(desk.folder / "out")
    assert main(shlex.split(report["repeat"])[1:]) == 0
    assert report_of(desk.folder / "out" / "again")["config"]["method"]["scaling_factor"] == best


def test_agreement_takes_the_experts_predictions_for_labels(desk):
    del desk.models["second"], desk.tasks["second"]
    config = desk.words("overwrite=true", method="task_arithmetic")
    options = {"over": {"scaling_factor": [1.0]}, "num_inputs": 12}
    scores = {score: suture.search(config, score=score, **options).best.score for score in ("agreement", "accuracy")}
    assert scores["agreement"] == 1.0  # the merge of one model is its expert
    assert scores["accuracy"] < 0.5


def test_every_point_is_scored_with_its_own_merge_and_the_first_one_too(desk, monkeypatch):
    sums = []

    def measured(self, module, task):
        sums.append(sum(parameter.double().sum().item() for parameter in module.parameters()))
        return torch.zeros(1)

    monkeypatch.setattr(searching._Scoring, "measure", measured)
    config = desk.words("overwrite=true", method="task_arithmetic")
    suture.search(config, over={"scaling_factor": [0.1, 0.9]}, num_inputs=12)
    upwards = sums.copy()
    sums.clear()
    suture.search(config, over={"scaling_factor": [0.9, 0.1]}, num_inputs=12)
    assert upwards == sums[::-1]
    assert len(set(sums)) == 2


def test_an_interrupted_search_resumes_with_the_same_result(desk, monkeypatch):
    options = {"over": {"scaling_factor": "0.1..1"}, "trials": 7, "num_inputs": 12, "sampler": "cma_es"}
    words = desk.words(method="task_arithmetic")
    measured = searching._Scoring.__call__
    count = []

    def counted(self, point):
        count.append(point)
        return measured(self, point)

    def struck(self, point):
        if len(count) == 4:
            raise KeyboardInterrupt
        return counted(self, point)

    monkeypatch.setattr(searching._Scoring, "__call__", struck)
    with pytest.raises(KeyboardInterrupt):
        suture.search(words, **options)
    assert not (desk.folder / "out").exists()
    count.clear()
    monkeypatch.setattr(searching._Scoring, "__call__", counted)
    resumed = suture.search(words, **options)
    assert len(count) == 3
    (desk.folder / "outputs").rename(desk.folder / "elsewhere")
    whole = suture.search([*words, "overwrite=true"], **options)
    assert whole.trials == resumed.trials
    assert len(count) == 10


def test_the_update_is_computed_once_where_only_its_scale_is_searched(desk, monkeypatch):
    prepared, prepare = [], searching.prepare_task_vectors
    monkeypatch.setattr(searching, "prepare_task_vectors", lambda *a: prepared.append(1) or prepare(*a))
    words = desk.words("overwrite=true", method="tsv_m")
    suture.search(words, over={"alpha": [0.5, 1.0, 1.5]}, num_inputs=12)
    assert len(prepared) == 1
    suture.search(words, over={"alpha": [0.6, 0.7]}, num_inputs=12)
    assert len(prepared) == 1, "the update of an earlier search is taken up"
    suture.search(words, over={"alpha": [0.6, 0.7]}, num_inputs=12, **{"method.vectors": "base"})
    assert len(prepared) == 2


def test_groups_take_a_scale_each_from_the_first_block_to_the_last(desk, monkeypatch):
    prepared, prepare = [], searching.prepare_task_vectors
    monkeypatch.setattr(searching, "prepare_task_vectors", lambda *a: prepared.append(1) or prepare(*a))
    words = ["method.alpha=0.2,1.4", "groups=2", "num_inputs=12", "score=accuracy", "split=test"]
    assert main(["search", *desk.words(*words, method="tsv_m")]) == 0
    report = report_of(desk.folder / "out")
    trials = {tuple(trial["point"].values()): trial["score"] for trial in report["search"]["trials"]}
    assert sorted(trials) == [(0.2, 0.2), (0.2, 1.4), (1.4, 0.2), (1.4, 1.4)]
    assert list(report["search"]["trials"][0]["point"]) == ["alpha.1", "alpha.2"]
    assert len(prepared) == 1
    method = report["config"]["method"]
    best = tuple(method["after"]["depth_schedule"]["factors"])
    assert trials[best] == max(trials.values())
    assert method["alpha"] == 1.0
    row = next(row for row in report["rows"] if row["name"] == "tsv_m+depth_schedule")
    assert row["mean"] == pytest.approx(trials[best])  # all 12 test inputs
    whole = suture.search(desk.words("overwrite=true", method="tsv_m"), over={"alpha": [0.2]}, num_inputs=12)
    assert len(prepared) == 1, "the update of a search in groups is taken up"
    assert list(whole.best.point) == ["alpha"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method.scaling_factor=0.3"], "nothing to search over"),
        (["method.scaling_fctor=0.1,0.2"], "scaling_factor"),
        (["method.scaling_factor=0.1,no"], "a search wants numbers"),
        (["method.scaling_factor=0.1,inf"], "finite"),
        (["method.scaling_factor=1..0"], "least, most"),
        ([*SWEEP, "score=luck"], "agreement"),
        ([*SWEEP, "sampler=dice"], "sampler"),
        ([*SWEEP, "trials=0"], "trials=0"),
        ([*SWEEP, "num_inputs=many"], "num_inputs=many"),
        ([*SWEEP, "split=validation"], "split"),
        ([*SWEEP, "groups=0"], "groups=0"),
        (["method.threshold=10,20", "groups=2", "method=ties_merging"], "without several values of method.scaling"),
        (["method=model_stock", "groups=2"], "without a method with a scale"),
        ([*SWEEP, "groups=2", "method.after=[svc]"], "groups=2 with method.after"),
        (["method.scaling_factor=-9..1", "method=ties_merging", "method.threshold=-5..20"], "threshold"),
    ],
)
def test_a_search_that_cannot_be_is_refused_in_one_line(desk, capsys, words, message):
    assert message in refused(capsys, ["search", *desk.words(*words, method="task_arithmetic")])


def test_a_search_without_inputs_is_refused(desk, capsys):
    words = [word for word in desk.words(*SWEEP, method="task_arithmetic") if not word.startswith("taskpool")]
    assert "A search needs inputs to score on" in refused(capsys, ["search", *words])
