"""`suture.run` and its kin: the command line's verbs as calls, with the same results and nothing printed."""

import json
import re
import shlex
from dataclasses import replace

import pytest
import torch
import yaml

import suture
from suture.adaptation.feature_norm import FeatureNorm
from suture.checkpoints import open_checkpoint
from suture.cli.main import main
from suture.errors import ConfigError, SutureError
from suture.pipeline import adamerging, config
from suture.pipeline.context import Context
from suture.pipeline.methods import learned_methods
from suture.pipeline.models import open_models
from suture.pipeline.pipeline import run_settings
from suture.pipeline.settings import Settings


def keywords(desk, **more):
    """The pools as mappings, as a notebook has them."""
    pools = {"modelpool": {"family": "clip", "models": desk.models}, "taskpool": {"tasks": desk.tasks}}
    return {"method": "ties_merging", "output": "out", **pools, **more}


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def test_a_run_from_keywords_equals_the_command_line_and_prints_nothing(desk, capsys):
    result = suture.run(**keywords(desk, method={"name": "ties_merging", "threshold": 30}))
    assert capsys.readouterr().out == ""
    assert result.folder.name == "out"
    assert [row.name for row in result.report.rows] == ["pretrained", "experts", "ties_merging"]
    assert main(desk.words("method.threshold=30", "output=typed")) == 0
    called, typed = report_of(result.folder), report_of(desk.folder / "typed")
    assert called["rows"] == typed["rows"]
    one, two = (dict(open_checkpoint(desk.folder / name / "model")) for name in ("out", "typed"))
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_a_run_and_a_search_write_below_the_name_of_the_pool_however_they_are_called(desk):
    desk.words()
    (desk.folder / "pool.yaml").rename(desk.folder / "letters.yaml")
    words = ["method=task_arithmetic", "modelpool=letters.yaml", "taskpool=tasks.yaml"]
    assert main([*words, "method.scaling_factor=0.2"]) == 0
    assert main(["search", *words, "method.scaling_factor=0.1,0.4", "num_inputs=4"]) == 0
    called = suture.run(words)
    searched = suture.search(words, over={"scaling_factor": [0.3]}, num_inputs=4)
    assert {each.folder.parent.as_posix() for each in (called, searched)} == {"outputs/letters/task_arithmetic"}
    assert [path.name for path in (desk.folder / "outputs").iterdir() if path.name != "resume"] == ["letters"]


def test_a_pool_that_is_a_mapping_has_no_name(desk):
    run = suture.run(**keywords(desk, output=None))
    assert run.folder.parent.as_posix() == "outputs/pool/ties_merging"


@pytest.mark.parametrize("method", learned_methods().values(), ids=lambda method: method.name)
def test_a_method_without_tasks_is_refused_where_it_says_that_it_needs_inputs(desk, capsys, method):
    assert main(["check", *desk.words(method=method.name)[:2]]) == (2 if method.inputs else 0)
    said = " ".join(capsys.readouterr())
    refusal = f"no inputs to learn from|method={method.name} needs unlabelled inputs"
    assert bool(re.search(refusal, said)) == method.inputs


def test_a_run_of_several_methods_has_a_folder_for_each(desk):
    configs = [config.compose(desk.words(method=method)) for method in ("simple_average", "ties_merging")]
    runs = [Settings.from_config(each) for each in configs]
    result = run_settings(runs, open_models(runs[0].pool), configs[0])
    folders = {path.parents[1].name for path in result.folder.glob("*/model/model.safetensors")}
    assert folders == {"simple_average", "ties_merging"}


def test_a_run_takes_words_and_dotted_keys(desk):
    words = desk.words()[:3]
    result = suture.run(words, output="somewhere else", **{"method.scaling_factor": 0.7})
    assert result.folder.name == "somewhere else"
    assert report_of(result.folder)["config"]["method"]["scaling_factor"] == 0.7


def test_the_command_of_a_report_runs_again_as_it_stands(desk):
    assert main(desk.words("method.scaling_factor=0.2", "repair=final", "repair.steps=3")) == 0
    first = report_of(desk.folder / "out")
    assert main([*shlex.split(first["command"])[1:], "overwrite=true"]) == 0
    assert report_of(desk.folder / "out")["rows"] == first["rows"]


def test_a_row_says_what_was_scored(desk):
    assert main(desk.words("repair=final", "repair.steps=3", method="task_arithmetic")) == 0
    rows = [
        [row[key] for key in ("role", "merge", "repair", "routed")] for row in report_of(desk.folder / "out")["rows"]
    ]
    assert rows == [
        ["pretrained", None, None, False],
        ["experts", None, None, False],
        ["merge", "task_arithmetic", None, False],
        ["repair", "task_arithmetic", "final", False],
        ["repair", "task_arithmetic", "final", True],
    ]


def test_the_old_name_of_the_group_means_the_same(desk):
    groups = ("repair", "surgery")
    results = [suture.run(desk.words(f"{group}=final", f"{group}.steps=3", f"output={group}")) for group in groups]
    one, two = (report_of(result.folder) for result in results)
    assert one["rows"] == two["rows"]
    assert one["config"]["repair"] == two["config"]["repair"]
    assert "surgery" not in two["config"]


def test_a_dry_run_and_a_check_find_the_same_and_write_nothing(desk):
    desk.replace("second", {k: t for k, t in desk.tensors("second").items() if not k.endswith("bias")})
    found = suture.run(**keywords(desk, dry_run=True))
    assert found.problems == suture.check(**keywords(desk)).problems
    assert "bias" in found.problems[0]
    assert not (desk.folder / "out").exists()
    with pytest.raises(SutureError, match="bias"):
        suture.run(**keywords(desk))


def test_a_pool_is_scored_from_python(desk):
    report = suture.evaluate_pool(**{key: value for key, value in keywords(desk).items() if key.endswith("pool")})
    assert [row.role for row in report.rows] == ["pretrained", "experts"]


def test_an_unknown_key_is_answered_with_the_nearest(desk):
    with pytest.raises(ConfigError, match="Did you mean 'output'"):
        suture.run(**keywords(desk), outputs="x")


def test_features_that_drift_are_a_note_of_the_report(desk, monkeypatch, capsys):
    norms = {"first": FeatureNorm(5.7, 3.1), "second": FeatureNorm(3.2, 3.1)}
    monkeypatch.setattr(adamerging, "feature_norms", lambda *a, **k: norms)
    assert main(desk.words("method.max_steps=2", "method.batch_size=4", method="adamerging")) == 0
    data = report_of(desk.folder / "out")
    assert any("Norm drift" in note and "'first'" in note for note in data["notes"])
    assert data["learning"]["layer_wise_adamerging"]["feature_norms"]["first"] == {"merged": 5.7, "expert": 3.1}
    assert "Norm drift" in capsys.readouterr().out


def time_of_states(folder, seconds):
    """Let every state in a folder say that its loop took so long."""
    for path in folder.glob("*.pt"):
        torch.save({**torch.load(path), "seconds": seconds}, path)


def test_the_time_of_a_loop_that_an_earlier_run_did_is_in_its_row(desk, capsys):
    learned = desk.words("method.max_steps=2", "method.batch_size=4", "repair=final", "repair.steps=3")
    words = ["method=adamerging", *learned[1:], "overwrite=true"]
    assert main(words) == 0
    assert not any("earlier run" in note for note in report_of(desk.folder / "out")["notes"])
    time_of_states(desk.folder / "outputs" / "resume", 1000.0)
    assert main(words) == 0
    report = report_of(desk.folder / "out")
    merge, repair = "layer_wise_adamerging", "layer_wise_adamerging + final"
    assert 1000 < report["seconds"][merge] < 1060
    assert 2000 < report["seconds"][repair] < 2060
    ends = "done by an earlier run of the same work; the table counts its 1000.0 s."
    assert report["notes"][-2:] == [f"{merge}: 2 steps were {ends}", f"{repair}: 3 steps were {ends}"]
    assert ".pt" not in capsys.readouterr().out


def test_a_fit_layer_by_layer_that_was_done_before_is_taken_up(desk):
    fit = ["repair=deep", "repair.fit=layerwise", "repair.steps=2", "overwrite=true"]
    reports = []
    for _ in range(2):
        assert main(desk.words(*fit, method="task_arithmetic")) == 0
        reports.append(report_of(desk.folder / "out"))
    assert reports[0]["rows"] == reports[1]["rows"]
    steps = 2 * 2 * 3  # of every task at two blocks and the final feature
    assert any(f"task_arithmetic + deep: {steps} steps were" in note for note in reports[1]["notes"])


@pytest.mark.parametrize("change", [{"precision": "bf16-mixed"}, {"devices": 2}], ids=["precision", "devices"])
def test_another_precision_or_number_of_devices_is_other_work(tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    context = Context(tmp_path, "inputs", {"accelerator": "cpu"})
    other = replace(context, fabric={**context.fabric, **change})
    assert context.resume("loop", "cache", {}).path != other.resume("loop", "cache", {}).path
    assert context.resume("loop", "cache", {}).path == replace(context).resume("loop", "cache", {}).path


def test_a_pool_of_one_s_own_is_named_as_it_was_typed(desk):
    assert main(desk.words()) == 0
    data = report_of(desk.folder / "out")
    assert data["config"]["choices"]["modelpool"] == "pool.yaml"
    assert "modelpool=pool.yaml" in data["command"]
    assert yaml.safe_load((desk.folder / "out" / "config.yaml").read_text())["choices"]["taskpool"] == "tasks.yaml"


def test_batch_sizes_that_are_found_give_the_same_table_and_are_in_the_report(desk):
    words = ["repair=final", "repair.steps=3"]
    assert main(desk.words(*words)) == 0
    assert main(desk.words(*words, "batch_size=auto", "output=auto")) == 0
    given, found = report_of(desk.folder / "out"), report_of(desk.folder / "auto")
    assert [row["accuracies"] for row in found["rows"]] == [row["accuracies"] for row in given["rows"]]
    line = next(note for note in found["notes"] if note.startswith("batch_size=auto, inputs at once: "))
    assert "scored " in line
    assert "encoded " in line
    assert main(desk.words("fast_dev_run=true", "batch_size=auto", "output=few")) == 0
