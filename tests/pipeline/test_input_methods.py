"""`method=regmean`, `regmean_pp` and `fisher`, and `repair=calibrate`: runs on the desk."""

import json

import pytest
from desk import refused

from suture.cli.main import main


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("method", ["regmean", "regmean++", "esm", "fisher"])
def test_a_method_with_inputs_merges_scores_and_saves(desk, method):
    assert main(desk.words("method.num_inputs=4", "method.split=train", method=method)) == 0
    report = report_of(desk.folder / "out")
    row = report["rows"][2]
    assert row["name"] == method.replace("++", "_pp")
    assert row["learned"] == "weights, solved on up to 4 train inputs a task"
    assert (desk.folder / "out" / "model" / "model.safetensors").is_file()


def test_calibration_is_a_repair_of_any_merge_and_goes_before_surgery(desk):
    quick = ["repair.final.steps=3", "repair.final.rank=2", "repair.final.batch_size=4"]
    assert (
        main(desk.words("repair=calibrate+final", "repair.calibrate.num_inputs=6", *quick, method="task_arithmetic"))
        == 0
    )
    out = desk.folder / "out"
    names = [row["name"] for row in report_of(out)["rows"]]
    assert names[2:5] == ["task_arithmetic", "task_arithmetic + calibrate", "task_arithmetic + calibrate + final"]
    assert (out / "model_calibrate" / "model.safetensors").is_file()


def test_values_out_of_range_are_refused(desk, capsys):
    assert "off_diagonal" in refused(capsys, desk.words("method.off_diagonal=2", method="regmean"))
    assert "floor" in refused(capsys, desk.words("method.floor=none", method="fisher"))
    assert "repair.mix" in refused(capsys, desk.words("repair=calibrate", "repair.mix=2", method="task_arithmetic"))
