"""What a terminal shows: tables of the longest names in 80 columns, one JSON document, or the result alone."""

import json
import os

import pytest
import torch
from desk import refused

from suture.analysis import similarity, trimming
from suture.cli.main import main
from suture.cli.tables import print_compared, print_finding, print_report
from suture.core import progress
from suture.evaluation import Row
from suture.pipeline.config import compose
from suture.pipeline.reproduce import Compared, published
from suture.reporting import Report


@pytest.fixture
def narrow(capsys, monkeypatch):
    """Returns what was printed, line by line, once it is known that no line is wider than 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")

    def lines():
        printed = capsys.readouterr().out.splitlines()
        assert max(map(len, printed)) <= 80, max(printed, key=len)
        return printed

    return lines


def twenty():
    pools = ["modelpool=clip-vit-base-patch32_TALL20", "taskpool=clip-vit-classification_TALL20"]
    return list(compose(["method=simple_average", *pools])["taskpool"]["tasks"])


def test_a_run_on_twenty_tasks_fits_80_columns(narrow):
    names = [
        "pretrained",
        "experts",
        "clip_layer_wise_adamerging",
        *(f"lw_adamergingpp + {x}" for x in ("deep", "final")),
    ]
    rows = [Row(n, dict.fromkeys(twenty(), 0.1 + i / 10), dict.fromkeys(twenty(), 19887)) for i, n in enumerate(names)]
    print_report(Report("clip_layer_wise_adamerging of 20 models", rows, rows[0], rows[1], notes=["a note " * 30]))
    lines = [line.split() for line in narrow()]
    for task in twenty():
        assert [*(f"{10 + 10 * i:.1f}" for i in range(5)), "19887"] in [line[1:] for line in lines if task in line[:1]]
    assert len(twenty()) == 20


def test_the_matrix_of_twenty_tasks_comes_in_parts(narrow):
    rows = [Row(n, {t: i / 20 + j / 1000 for j, t in enumerate(twenty())}) for i, n in enumerate(twenty())]
    print_report(Report("evaluation", rows, matrix=rows))
    numbers = [line.split()[1:] for line in narrow() if "…" not in line.split()[1:] and line.count(".") in (4, 8)]
    told = [number for part in (numbers[:20], numbers[20:40], numbers[40:]) for number in part[3]]
    assert told == [f"{15 + j / 10:.1f}" for j in range(20)]


def test_many_models_fit_80_columns(narrow):
    names = [f"clip_layer_wise_adamerging + final scaling_factor=0.{i}, routed" for i in range(12)]
    print_report(Report("a sweep", [Row(name, dict.fromkeys(twenty(), 0.5)) for name in names]))
    assert sum("50.0" in line for line in narrow()) == 12


def test_findings_on_twenty_models_fit_80_columns(narrow):
    names = [f"vision_model.encoder.layers.{i}.self_attn.out_proj.weight" for i in range(12)]
    weights = lambda i: {name: torch.full((4,), float(i)) for name in names}
    base, models = weights(0), {task: weights(i + 1) for i, task in enumerate(twenty())}
    print_finding(similarity(base, models))
    assert any("1.000" in line for line in narrow())
    print_finding(trimming(base, models))
    shown = [line.split()[0] for line in narrow() if "out_proj.weight" in line]
    assert shown == [f"{i}.self_attn.out_proj.weight" for i in range(12)]


def test_published_figures_beside_a_run_fit_80_columns(narrow):
    print_compared([Compared(figure, figure.mean + 0.05) for figure in published()])
    assert sum("within" in line for line in narrow()) == len(published())


@pytest.mark.parametrize(
    "words", [["methods"], ["methods", "dare"], ["pools"], ["zoo"], ["reproduce"], ["--version"]], ids=" ".join
)
def test_what_needs_no_model_is_one_document(words, capsys):
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert main([*words, "--quiet"]) == 0
    assert capsys.readouterr().out


def test_methods_in_json_have_knobs_and_papers(capsys):
    assert main(["--json", "methods"]) == 0
    told = {method["name"]: method for method in json.loads(capsys.readouterr().out)}
    assert told["ties_merging"]["knobs"]["threshold"] == 20.0
    assert told["simple_average"]["aliases"] == ["weight_averaging", "weight_average"]
    assert main(["methods", "--quiet"]) == 0
    assert capsys.readouterr().out.split() == list(told)


def test_a_run_in_json_is_its_report(desk, capsys):
    assert main([*desk.words(), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"folder": "out", **json.loads((desk.folder / "out" / "report.json").read_text())}


def test_a_quiet_run_says_where_it_is(desk, capsys):
    assert main([*desk.words(), "--quiet"]) == 0
    assert capsys.readouterr() == ("out\n", "")


def test_a_sweep_and_a_dry_run_are_one_document(desk, capsys):
    words = [word for word in desk.words("hydra.sweep.dir=sweep") if word != "output=out"]
    assert main(["-m", *words, "method.scaling_factor=0.1,0.2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [run["folder"][-7:] for run in told["runs"]] == ["sweep/0", "sweep/1"]
    assert main([*desk.words("dry_run=true"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []


def test_check_in_json_and_quiet(desk, capsys):
    assert main(["check", *desk.words(), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"] > 0
    assert main(["check", *desk.words(), "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    desk.tasks["first"]["classnames"] = ["zero", "one"]
    assert main(["check", *desk.words(), "--json"]) == 2
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 1
    assert main(["check", *desk.words(), "--quiet"]) == 2
    assert "Task 'first'" in capsys.readouterr().out


def test_evaluate_merge_analyse_and_report_in_json_and_quiet(desk, capsys):
    assert main([*desk.words(), "--quiet"]) == 0
    capsys.readouterr()
    models = ["base=" + desk.models["_pretrained_"], "models.first=" + desk.models["_pretrained_"], "method=dare"]
    for words, key, brief in (
        (["evaluate", *desk.words("matrix=true", "output=null")], "rows", "pretrained\t"),
        (["merge", *models, "output=merged"], "finished", "merged\n"),
        (["merge", *models, "output=planned", "--plan"], "seconds", "merge "),
        (["analyse", "similarity", *desk.words("output=seen")], "rows", "seen\n"),
        (["report", "out"], "page", "out/report.html\n"),
    ):
        assert main([*words, "--json"]) == 0
        assert key in json.loads(capsys.readouterr().out)
        again = [word.replace("output=merged", "output=merged2").replace("=seen", "=again") for word in words]
        assert main([*again, "--quiet"]) == 0
        assert capsys.readouterr().out.startswith(brief.replace("merged", "merged2").replace("seen", "again"))


def test_errors_are_one_line_in_every_manner(desk, capsys):
    for manner in ("--json", "--quiet"):
        assert "Did you mean 'ties_merging'" in refused(capsys, [manner, *desk.words(method="ties_mergin")])
        assert "does not go with --help" in refused(capsys, ["method=dare", "--help", manner])
    assert "does not go with --quiet" in refused(capsys, ["methods", "--quiet", "--json"])


def test_traceback_shows_where_an_error_came_from(desk, capsys):
    assert main([*desk.words(method="ties_mergin"), "--traceback"]) == 2
    *trace, line = capsys.readouterr().err.splitlines()
    assert trace[0] == "Traceback (most recent call last):"
    assert line.startswith("suture: Unknown method 'ties_mergin'")


def test_nothing_moves_at_a_terminal_that_asked_for_quiet(monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress, "_PATIENCE", -1.0)
    shown = []
    monkeypatch.setattr(progress._Bar, "advance", lambda bar, steps: shown.append(steps))
    with progress.silent(), progress.bar("quiet", 1) as advance:
        advance(1)
    assert shown == []
    with progress.bar("loud", 1) as advance:
        advance(1)
    assert shown == [1]


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "30000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_threads_that_wait_give_way_unless_the_user_says_how_they_wait(given, spins, monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert main(["--version"]) == 0
    assert os.environ.get("GOMP_SPINCOUNT") == spins
