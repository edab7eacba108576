"""`method=tall_masks` and `method=emr_merging` from the command line: rows, costs, files, and what is refused."""

import json

import pytest
import torch
from desk import refused

from suture import MaskedModel, TaskMasks, emr_masks, open_checkpoint, run, tall_masks
from suture.cli.main import main
from suture.families.clip import Clip
from suture.pipeline.methods import find_method

METHODS = ["tall_masks", "emr_merging"]


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def rows_of(folder):
    return [row["name"] for row in report_of(folder)["rows"]]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_scores_the_average_and_the_tasks_models_named_and_routed(desk, capsys, method):
    assert main(desk.words(method=method)) == 0
    out = desk.folder / "out"
    report = report_of(out)
    assert rows_of(out)[2:] == [method, f"{method} + masks", f"{method} + masks, routed"]
    named, routed = report["rows"][3:]
    assert [row["role"] for row in report["rows"][2:]] == ["merge", "repair", "repair"]
    assert [(row["needs_task"], row["routed"]) for row in (named, routed)] == [(True, False), (False, True)]
    assert [row["learned"] for row in report["rows"][2:]] == ["", "", "router on 12 train inputs a task"]
    assert all(routed["accuracies"][task] <= named["accuracies"][task] for task in ("first", "second"))
    repair = report["repairs"][f"{method} + masks"]
    assert repair["encoders_at_inference"] == 2
    note = next(line for line in report["notes"] if line.startswith(f"{method} stores"))
    assert "2 bits a weight; 2 models would take" in note
    assert "A routed input takes two" in note
    assert note.split(":")[0] in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(("method", "make"), [("tall_masks", tall_masks), ("emr", emr_masks)])
def test_the_files_of_a_run_are_the_masks_and_the_average(desk, method, make):
    assert main(desk.words(method=method)) == 0
    path, base = desk.folder / "out" / "task_masks.safetensors", desk.models["_pretrained_"]
    masks = TaskMasks.load(path, base)
    assert masks.tasks == ("first", "second")
    average, saved = masks.average(), open_checkpoint(desk.folder / "out" / "model")
    assert all(torch.equal(saved[name], average[name]) for name in saved)
    towers = {t: {k: v for k, v in desk.tensors(t).items() if k in masks.update} for t in masks.tasks}
    vision = {name: open_checkpoint(base)[name] for name in masks.update}
    expected = make(vision, towers).for_task("second")
    assert all(torch.equal(masks.for_task("second")[name], tensor) for name, tensor in expected.items())
    encoder = Clip(base).encoder()
    model = MaskedModel.load(path, encoder, base)
    pixels = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    assert model(pixels, "first").shape == model(pixels).shape == (2, 8)


def test_without_a_router_one_encoder_runs(desk):
    assert main(desk.words("method.router=none", method="emr")) == 0
    assert rows_of(desk.folder / "out")[2:] == ["emr_merging", "emr_merging + masks"]
    report = report_of(desk.folder / "out")
    assert report["repairs"]["emr_merging + masks"]["encoders_at_inference"] == 1
    assert not any("routed" in note for note in report["notes"])


def test_without_tasks_the_masks_are_made_all_the_same(desk):
    words = [word for word in desk.words(method="tall_masks") if not word.startswith("taskpool")]
    assert main(words) == 0
    masks = TaskMasks.load(desk.folder / "out" / "task_masks.safetensors", desk.models["_pretrained_"])
    assert masks.tasks == ("first", "second")


def test_a_repair_follows_the_average(desk):
    quick = ["repair=final", "repair.steps=2", "repair.rank=2", "repair.batch_size=4", "repair.compare=0"]
    assert main(desk.words(*quick, method="tall_masks")) == 0
    names = ["tall_masks", "tall_masks + masks", "tall_masks + masks, routed"]
    assert rows_of(desk.folder / "out")[2:] == [*names, "tall_masks + final", "tall_masks + final, routed"]
    assert (desk.folder / "out" / "surgery.safetensors").is_file()
    assert (desk.folder / "out" / "task_masks.safetensors").is_file()


def test_the_router_may_learn_from_few_inputs_of_either_split(desk):
    result = run(desk.words("method.num_inputs=3", "method.split=test", "method.router=centroids", method="emr"))
    fitted = result.report.repairs["emr_merging + masks"]
    assert (fitted.inputs, fitted.split, fitted.model.router.name) == (6, "test", "centroids")
    assert fitted.model.masks.bytes_stored < fitted.model.masks.bytes_of_models


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method.mask_threshold=-1"], "method.mask_threshold=-1 does not fit tall_masks"),
        (["method.mask_threshold=[0.4]"], "method.mask_threshold has 1 values; wanted one per model, 2."),
        (["method.router=nearest"], "method.router='nearest' does not fit tall_masks"),
        (["method.num_inputs=0"], "method.num_inputs=0 does not fit tall_masks"),
    ],
)
def test_a_bad_knob_is_refused_in_one_line(desk, capsys, words, message):
    assert message in refused(capsys, desk.words(*words, method="tall_masks"))


def test_an_expert_without_a_task_is_refused_before_anything_is_merged(desk, capsys):
    del desk.tasks["second"]
    assert "Model 'second' has no task of its name" in refused(capsys, desk.words(method="emr"))


def test_the_alias_names_the_same_method():
    assert find_method("emr").name == "emr_merging"
