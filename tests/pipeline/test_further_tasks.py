"""Tasks with `model:`: further tests of one expert, which nothing learns from."""

import json

import pytest
from desk import refused

from suture.cli.main import main


@pytest.fixture
def further(desk):
    """The desk, with the data of its first task under a second name."""
    desk.tasks["again"] = desk.tasks["first"] | {"model": "first"}
    return desk


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("repair", ["final", "deep", "calibrate"])
def test_they_are_scored_in_every_row_as_the_experts_own_task(further, repair):
    quick = [] if repair == "calibrate" else ["repair.steps=3", "repair.rank=2"]
    assert main(further.words(f"repair={repair}", "repair.num_inputs=6", *quick)) == 0
    rows = report_of(further.folder / "out")["rows"]
    assert len(rows) == (4 if repair == "calibrate" else 5)
    for row in rows:
        assert row["accuracies"]["again"] == row["accuracies"]["first"], row["name"]


def test_nothing_is_learned_from_them(further):
    words = ["repair.steps=3", "repair.rank=2", "repair=final", "repair.router=none"]
    assert main(further.words(*words)) == 0
    del further.tasks["again"]
    assert main(further.words(*words, "output=alone")) == 0
    files = [path.relative_to(further.folder / "out") for path in (further.folder / "out").rglob("*.safetensors")]
    assert len(files) > 1
    for file in files:
        assert (further.folder / "out" / file).read_bytes() == (further.folder / "alone" / file).read_bytes()


def test_task_masks_give_them_the_experts_model(further):
    assert main(further.words(method="tall_masks")) == 0
    masked = next(row for row in report_of(further.folder / "out")["rows"] if row["needs_task"] and row["repair"])
    assert masked["accuracies"]["again"] == masked["accuracies"]["first"]


def test_a_model_that_is_not_there_is_refused(further, capsys):
    further.tasks["again"]["model"] = "frist"
    assert "Task 'again': Unknown model 'frist'. Did you mean 'first'?" in refused(capsys, further.words())


def test_a_task_of_a_models_name_cannot_be_another_models(desk, capsys):
    desk.tasks["first"]["model"] = "second"
    assert "has the name of a model" in refused(capsys, desk.words())
