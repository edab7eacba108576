"""Finished runs say how to repeat them, on which machine they ran, and what a router cannot tell apart."""

import html
import json
import re
import shlex

import pytest
import torch
import yaml

import suture
from suture.cli.main import main
from suture.core.machine import circumstances, commit
from suture.pipeline.scoring import shared_inputs


def told(folder):
    return json.loads((folder / "report.json").read_text())


def command_on(page):
    found = re.search(r"<pre class=command>(.*?)</pre>", page.read_text("utf-8"), re.DOTALL)
    assert found is not None
    return html.unescape(found[1])


def test_the_command_on_the_page_repeats_the_run_from_its_folder(desk, monkeypatch):
    """The pools are YAML files with relative paths, and a knob and a model are set on the command line."""
    (desk.folder / "data").symlink_to(desk.folder / desk.tasks["first"]["source"] / "..")
    desk.tasks["first"]["source"] = "data/first"
    words = desk.words("repair=final", "repair.steps=3", "repair.rank=2", "method.scaling_factor=0.4")
    assert main([*words, f"modelpool.models.second={desk.models['first']}"]) == 0
    command = shlex.split(command_on(desk.folder / "out" / "report.html"))
    assert command[0] == "suture"
    assert command[-3:] == ["modelpool=modelpool.yaml", "taskpool=taskpool.yaml", "output=again"]
    (desk.folder / "out").rename(desk.folder / "moved")
    for name in ("pool.yaml", "tasks.yaml"):
        (desk.folder / name).unlink()
    monkeypatch.chdir(desk.folder / "moved")
    assert main(command[1:]) == 0
    first, again = told(desk.folder / "moved"), told(desk.folder / "moved" / "again")
    assert [row["accuracies"] for row in again["rows"]] == [row["accuracies"] for row in first["rows"]]
    assert again["rows"] == first["rows"]
    hashes = [list(run["provenance"]["inputs"]["second"]["files"].values()) for run in (first, again)]
    assert hashes[0] == hashes[1]


def test_a_run_from_python_is_repeated_on_the_command_line(desk, monkeypatch):
    desk.words()
    pools = {"modelpool": {"family": "clip", "models": desk.models}, "taskpool": {"tasks": desk.tasks}}
    suture.run(method={"name": "ties_merging", "threshold": 30}, output=desk.folder / "out", **pools)
    command = shlex.split(told(desk.folder / "out")["repeat"])
    assert yaml.safe_load((desk.folder / "out" / "modelpool.yaml").read_text())["models"] == desk.models
    monkeypatch.chdir(desk.folder / "out")
    assert main(command[1:]) == 0
    assert told(desk.folder / "out" / "again")["rows"] == told(desk.folder / "out")["rows"]


def test_a_sweep_repeats_each_of_its_runs(desk):
    words = [word for word in desk.words(method="simple_average,task_arithmetic") if not word.startswith("output")]
    assert main([*words, "--multirun", "hydra.sweep.dir=sweep"]) == 0
    lines = told(desk.folder / "sweep")["repeat"].splitlines()
    assert [line.startswith(f"(cd {i} && suture ") for i, line in enumerate(lines)] == [True, True]
    assert (desk.folder / "sweep" / "1" / "modelpool.yaml").is_file()


def test_no_path_of_the_machine_is_on_the_page_or_in_the_table(desk):
    """The page has the configuration, the provenance and the notes of a run with absolute paths in all of them."""
    assert main(desk.words("repair=calibrate", f"output={desk.folder / 'out'}")) == 0
    out = desk.folder / "out"
    assert str(desk.folder) in (out / "report.json").read_text()
    for name in ("report.html", "report.md", "table.csv", "table.tex"):
        text = (out / name).read_text("utf-8")
        for path in (desk.folder, *desk.folder.parents[:-2], desk.models["first"]):
            assert str(path) not in text, name
    assert "…/first.safetensors" in re.sub(r"…/[^/\"]+/", "…/", (out / "report.html").read_text("utf-8"))


def test_a_run_names_its_machine_and_its_memory(desk):
    assert main(desk.words()) == 0
    known = told(desk.folder / "out")["circumstances"]
    assert set(known) == {"date", "commit", "hardware", "peak_memory"}
    assert known["hardware"]["threads"] == torch.get_num_threads()
    assert known["peak_memory"]["process"] > 50 * 2**20
    page = (desk.folder / "out" / "report.html").read_text("utf-8")
    assert known["hardware"]["processor"] in html.unescape(page)
    assert "Peak memory of the process" in page


def test_the_commit_is_that_of_a_checkout_and_empty_elsewhere(tmp_path):
    import subprocess

    assert commit(tmp_path) == ""
    git = lambda *words: subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path)
    (tmp_path / "file").write_text("one")
    for words in (["init", "-q"], ["add", "file"], ["commit", "-qm", "first"]):
        assert git(*words).returncode == 0
    head = commit(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", head)
    (tmp_path / "file").write_text("other")
    assert commit(tmp_path) == f"{head} + changes"
    assert "hardware" in circumstances()


@pytest.mark.parametrize("kind", ["calibrate", "distil"])
def test_a_repair_of_the_weights_has_its_representation_compared(desk, kind):
    more = ["repair.steps=4", "repair.batch_size=4"] if kind == "distil" else []
    assert main(desk.words(f"repair={kind}", *more, method="task_arithmetic")) == 0
    repair = told(desk.folder / "out")["repairs"][f"task_arithmetic + {kind}"]
    before, after = (repair["representation"][when]["l1"] for when in ("before", "after"))
    assert list(before) == ["first", "second"]
    assert before["first"] != after["first"]
    assert all(layer.endswith(f"layers.{i}") for i, layer in enumerate(list(before["first"])[:-1]))
    pictures = {path.name for path in (desk.folder / "out" / "figures").iterdir()}
    assert {f"{name}_task_arithmetic_{kind}.svg" for name in ("l1_by_layer", "representation")} <= pictures


def test_rows_say_which_split_they_learned_from_and_what_they_add(desk):
    words = desk.words("repair=final", "repair.steps=3", "repair.rank=2", "repair.split=train", method="ties_merging")
    assert main(words) == 0
    rows = {row["name"]: row for row in told(desk.folder / "out")["rows"]}
    merged, repaired = rows["ties_merging"], rows["ties_merging + final"]
    routed = rows["ties_merging + final, routed"]
    assert [row["split"] for row in (merged, repaired, routed)] == ["", "train", "train"]
    assert merged["added_parameters"] == 0 < repaired["added_parameters"] < routed["added_parameters"]
    assert set(routed["routing"]) == {"first", "second"}
    assert routed["intervals"]["first"][0] <= routed["accuracies"]["first"] <= routed["intervals"]["first"][1]


def test_tasks_with_the_same_inputs_are_named_because_no_router_tells_them_apart(desk):
    desk.tasks["second"]["source"] = desk.tasks["first"]["source"]
    assert main(desk.words("repair=final", "repair.steps=3", "repair.rank=2")) == 0
    line = "Tasks 'first' and 'second' share inputs (100% of those compared)"
    assert any(line in warning for row in told(desk.folder / "out")["rows"] for warning in row["warnings"])
    assert line in html.unescape((desk.folder / "out" / "report.html").read_text("utf-8"))


def test_other_inputs_are_not_called_shared():
    torch.manual_seed(0)
    one, other = torch.randn(300, 8), torch.randn(50, 8)
    assert shared_inputs({"one": one, "other": other}) == ()
    few = shared_inputs({"one": one, "other": torch.cat([other, one[:150] * (1 + 1e-6)])})
    assert len(few) == 1
    assert "(50% of those compared)" in few[0]
