"""Whole runs whose weights are split over processes: the tables and files of one process."""

import json

import pytest
import torch
from desk import refused

from suture.checkpoints import open_checkpoint
from suture.cli.main import main
from suture.storage.resume import Resume

FSDP = ["fabric.strategy=fsdp", "fabric.devices=2", "fabric.accelerator=cpu"]
QUICK = {"final": ["repair.steps=20"], "deep": ["repair.steps=6"], "prob_surgery": ["repair.steps=20"]}


def report(folder):
    return json.loads((folder / "report.json").read_text())


def rows(folder):
    names = ("accuracies", "samples", "routing", "added_parameters", "warnings")
    return {row["name"]: {name: row.get(name) for name in names} for row in report(folder)["rows"]}


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("final", "affine", "prob_surgery")]


@pytest.mark.parametrize("kind", ["deep", "calibrate", *SLOW])
def test_a_repair_of_weights_that_are_split_is_that_of_one_process(desk, kind):
    words = desk.words(f"repair={kind}", *QUICK.get(kind, []), method="task_arithmetic")
    assert main([*words, "output=one"]) == 0
    assert main([*words, *FSDP, "output=two"]) == 0
    one, two = desk.folder / "one", desk.folder / "two"
    assert rows(two) == rows(one)
    assert len(rows(one)) >= 4
    for path in one.rglob("*.safetensors"):
        expected, found = open_checkpoint(path), open_checkpoint(two / path.relative_to(one))
        assert list(found) == list(expected)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-4, msg=f"{path.name}: {name}")
    assert not list(two.rglob(".encodings-*"))
    assert [note for note in report(two)["notes"] if "fsdp" in note] == [
        "Weights were split over processes (fabric.strategy=fsdp). Representations were not compared."
    ]


def test_a_chain_and_a_learned_merge_are_those_of_one_process(desk):
    chain = ["repair=calibrate+final", "repair.final.steps=20", "method.max_steps=3", "method.batch_size=4"]
    words = desk.words(*chain, method="adamerging")
    assert main([*words, "output=one"]) == 0
    assert main([*words, *FSDP, "output=two"]) == 0
    assert rows(desk.folder / "two") == rows(desk.folder / "one")
    norms = [
        report(desk.folder / name)["learning"]["layer_wise_adamerging"]["feature_norms"] for name in ("one", "two")
    ]
    for task, norm in norms[0].items():
        assert norms[1][task] == pytest.approx(norm, rel=1e-4)


def test_a_repair_that_was_killed_in_its_loop_goes_on_in_the_same_processes(desk, monkeypatch, capsys):
    words = desk.words("repair=final", "repair.steps=400", "repair.router=none", *FSDP, method="task_arithmetic")
    assert main([*words, "output=whole", "repair.cache_dir=whole-states"]) == 0
    save = Resume.save

    def struck(self, state):
        save(self, state)
        if len(state["losses"]) < 400:
            raise RuntimeError("struck")

    monkeypatch.setattr(Resume, "due", lambda self: True)
    with monkeypatch.context() as patch:
        patch.setattr(Resume, "save", struck)
        assert main(words) != 0
    assert main(words) == 0
    assert rows(desk.folder / "out") == rows(desk.folder / "whole")
    notes = report(desk.folder / "out")["notes"]
    assert any("done by an earlier run of the same work" in note for note in notes)


@pytest.mark.parametrize(
    ("method", "words", "what"),
    [
        ("regmean", [], "method=regmean"),
        ("task_arithmetic", ["repair=distil"], "repair=distil"),
        ("task_arithmetic", ["repair=blend"], "repair=blend"),
        ("task_arithmetic", ["repair=final", "repair.eval_iterations=5"], "repair.eval_iterations"),
        ("tall_masks", [], "method=tall_masks"),
    ],
)
def test_what_needs_whole_weights_is_refused_before_any_work(desk, capsys, monkeypatch, method, words, what):
    from suture.families.clip import Clip

    monkeypatch.setattr(Clip, "decode", lambda *a, **k: pytest.fail("decoded"))
    line = refused(capsys, desk.words(*words, *FSDP, method=method))
    assert f"fabric.strategy=fsdp with {what}, which needs whole weights on one device" in line


@pytest.mark.parametrize("verb", [["search"], ["analyse", "interpolation"]])
def test_a_job_that_has_no_use_for_parts_of_weights_refuses_them(desk, capsys, verb):
    words = [word for word in desk.words(method="task_arithmetic") if "output" not in word]
    line = refused(capsys, [*verb, *words, "method.scaling_factor=0.1,0.3" if len(verb) == 1 else "seed=1", *FSDP])
    assert "fabric.strategy=fsdp with" in line
    assert "which needs whole weights on one device. Remedy: leave it out." in line


@pytest.mark.parametrize(
    ("method", "words", "line"),
    [
        ("task_arithmetic", [], "starts this command as 2 processes, but only AdaMerging shares its work"),
        ("lw_adamerging", ["repair=final", *FSDP], "by torchrun or Slurm, is for AdaMerging alone"),
    ],
)
def test_processes_that_would_all_do_the_same_are_refused(desk, capsys, monkeypatch, method, words, line):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert line in refused(capsys, desk.words(*words, method=method))
