"""The command line: a run from words to a folder, and every kind of bad input in one line with nothing written."""

import gc
import json
import os
import pickle
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from desk import refused

from suture.cli.main import main
from suture.core.fabric import OneDevice
from suture.evaluation import Scorer
from suture.families.clip import ClipEncoder
from suture.pipeline import pipeline


def test_a_run_leaves_one_folder_with_everything(desk, capsys):
    assert main(desk.words()) == 0
    out = desk.folder / "out"
    written = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    wanted = {
        "config.yaml",
        "report.json",
        "figures.json",
        "report.md",
        "report.html",
        "figures/accuracy.png",
        "figures/accuracy.svg",
    }
    assert (
        wanted | {"model/model.safetensors", "model/config.json", "model/tokenizer.json", "model/README.md"} <= written
    )
    report = json.loads((out / "report.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["pretrained", "experts", "ties_merging"]
    assert report["samples"] == {"first": 12, "second": 12}
    assert report["config"]["method"]["scaling_factor"] == 0.3
    assert set(report["provenance"]["inputs"]) == {"_pretrained_", "first", "second"}
    shown = capsys.readouterr().out
    assert "ties_merging of 2 models" in shown
    assert "default-src 'none'" in (out / "report.html").read_text()


def files(desk):
    first, second = desk.models["first"], desk.models["second"]
    return [f"base={first}", f"models.one={first}", f"models.other={second}"]


def test_files_are_checked_without_a_pool_hydra_and_transformers(desk):
    program = """
import sys
from suture.cli.main import main
code = main(["check", *sys.argv[1:], "method=ties_merging", "output=new", "--json"])
heavy = {"hydra", "omegaconf", "transformers", "rich", "sympy"} & set(sys.modules)
sys.exit(code or (", ".join(heavy) if heavy else 0))
"""
    command = [sys.executable, "-c", program, *files(desk)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found, tensors = json.loads(done.stdout), desk.tensors("first")
    assert (found["problems"], found["tensors"]) == ([], len(tensors))
    assert found["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert found["bytes_read"] == 2 * 3 * 4 * found["parameters"]  # in two passes
    assert not (desk.folder / "new").exists()


def test_all_problems_of_files_are_found_at_once(desk, capsys):
    tensors = desk.tensors("second")
    gone, *_, nan = tensors
    del tensors[gone]
    tensors[nan].fill_(float("nan"))
    desk.replace("second", tensors)
    assert main(["check", *files(desk), "method=nearswap"]) == 2
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("problem: ")]
    assert len(problems) == 3
    assert f"'{gone}' is missing in 'other'" in problems[0]
    assert "nearswap merges 1 fine-tuned model beside the base; found 2" in problems[1]
    assert f"'{nan}' holds NaN or Inf in 'other'" in problems[2]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["base=x"], "Missing argument: models.NAME=…"),
        (["models.a=x"], "Missing argument: base=…"),
        (["base=x", "models=y"], "models=y: a model needs a name. Remedy: models.NAME=y"),
        (["base=x", "models.a=y", "modelpool=z.yaml"], "modelpool: a check of files takes base, models, method and"),
        (["base=x", "models.a=y"], "suture: 'base': 'x' does not exist"),
    ],
)
def test_a_check_of_files_that_lacks_one_is_one_line(words, line, capsys):
    assert main(["check", *words]) == 2
    assert line in capsys.readouterr().err


def test_brackets_of_a_remedy_are_printed(desk, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (desk.folder / "test.parquet").write_bytes(b"")
    desk.tasks["first"]["source"] = str(desk.folder)
    assert main(["check", *desk.words()]) == 2
    assert "Remedy: pip install 'suture[data]'." in capsys.readouterr().out


def test_a_verbose_run_says_what_it_reads_and_how_long_stages_take(desk, capsys):
    assert main([*desk.words(), "-v"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert f"first: {len(desk.tensors('first'))} tensors in {desk.models['first']}" in said
    assert [line.partition(":")[0] for line in said if line.endswith(" s")].count("merging weights") == 1
    assert main([*desk.words(), "output=again"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["-v", "-q", "pools"]) == 2
    assert "--quiet does not go with --verbose" in capsys.readouterr().err


def test_the_merged_model_loads_in_transformers_with_nothing_of_ours(desk):
    assert main(desk.words(method="task_arithmetic")) == 0
    program = """
import sys, torch, transformers
transformers.utils.logging.set_verbosity_error()
model = transformers.CLIPModel.from_pretrained(sys.argv[1])
processor = transformers.CLIPTokenizer.from_pretrained(sys.argv[1])
assert "suture" not in sys.modules
torch.save({k: v.clone() for k, v in model.state_dict().items()}, sys.argv[2])
"""
    command = [sys.executable, "-c", program, desk.folder / "out" / "model", desk.folder / "loaded.pt"]
    subprocess.run(command, check=True, capture_output=True)
    loaded = torch.load(desk.folder / "loaded.pt")
    base, first, second = (desk.tensors(name) for name in ("_pretrained_", "first", "second"))
    for name, tensor in loaded.items():
        expected = base[name] + 0.3 * (first[name] + second[name] - 2 * base[name]) if name in first else base[name]
        torch.testing.assert_close(tensor, expected)


def test_the_same_words_give_the_same_bits(desk):
    assert main(desk.words()) == 0
    assert main(desk.words("output=again")) == 0
    one, two = ((desk.folder / name / "model" / "model.safetensors").read_bytes() for name in ("out", "again"))
    assert one == two


def test_a_sweep_runs_every_value(desk):
    words = [
        word for word in desk.words("method.scaling_factor=0.1,0.3", "hydra.sweep.dir=sweep") if word != "output=out"
    ]
    assert main(["--multirun", *words]) == 0
    factors = []
    for job in ("0", "1"):
        factors.append(
            json.loads((desk.folder / "sweep" / job / "report.json").read_text())["config"]["method"]["scaling_factor"]
        )
    assert factors == [0.1, 0.3]
    summary = json.loads((desk.folder / "sweep" / "report.json").read_text())
    names = [row["name"] for row in summary["rows"]]
    assert names == ["pretrained", "experts", "ties_merging scaling_factor=0.1", "ties_merging scaling_factor=0.3"]
    assert [point[0] for point in summary["curves"]["scaling_factor"]["ties_merging"]] == [0.1, 0.3]
    assert (desk.folder / "sweep" / "figures" / "accuracy_over_scaling_factor.png").exists()


def test_a_sweep_does_not_keep_the_models_of_its_runs(desk, monkeypatch):
    run, alive, results = pipeline.run, [], []

    def watched(configuration):
        gc.collect()
        alive.append(sum(result() is not None for result in results))
        result = run(configuration)
        results.append(weakref.ref(result))
        return result

    monkeypatch.setattr(pipeline, "run", watched)
    words = [word for word in desk.words("method.scaling_factor=0.1,0.2,0.3") if word != "output=out"]
    assert main(["--multirun", *words, "hydra.sweep.dir=sweep"]) == 0
    assert alive == [0, 0, 0]


def test_a_sweep_scores_the_pretrained_model_and_the_experts_once(desk, monkeypatch):
    measured, experts = [], Scorer.experts
    monkeypatch.setenv("SUTURE_CACHE", str(desk.folder / "cache"))
    monkeypatch.setattr(Scorer, "experts", lambda self, *a: measured.append(1) or experts(self, *a))

    def sweep(folder):
        words = [word for word in desk.words("method.scaling_factor=0.1,0.3") if word != "output=out"]
        assert main(["--multirun", *words, f"hydra.sweep.dir={folder}"]) == 0

    rows = lambda folder: json.loads((desk.folder / folder / "report.json").read_text())["rows"]
    sweep("one")
    assert len(measured) == 1
    assert main(desk.words()) == 0
    assert len(measured) == 2, "a run alone measures everything itself"
    assert rows("one/1") == rows("out")
    source = desk.folder / "relabelled"
    shutil.copytree(desk.tasks["first"]["source"], source)
    desk.tasks["first"]["source"] = str(source)
    labels = source / "t10k-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:8] + bytes(12))
    sweep("two")
    assert len(measured) == 3, "other data have other scores"


def test_models_are_scored_where_and_how_fabric_says(desk, monkeypatch):
    seen = []
    monkeypatch.setattr(OneDevice, "device", property(lambda self: seen.append("device") or torch.device("cpu")))
    forward = ClipEncoder.forward

    def watched(self, pixels):
        features = forward(self, pixels)
        seen.append(features.dtype)
        return features

    monkeypatch.setattr(ClipEncoder, "forward", watched)
    assert main(desk.words("fabric.precision=bf16-mixed")) == 0
    assert set(seen) == {"device", torch.bfloat16}


def test_a_dry_run_writes_nothing(desk, capsys):
    assert main(desk.words("dry_run=true")) == 0
    assert not (desk.folder / "out").exists()
    assert "everything fits" in capsys.readouterr().out


def test_check_lists_all_problems(desk, capsys):
    broken = desk.tensors("first")
    broken.pop("vision_model.pre_layrnorm.weight")
    desk.replace("first", broken)
    desk.tasks["second"]["classnames"] = ["zero", "one"]
    assert main(["check", *desk.words()]) == 2
    out = capsys.readouterr().out
    assert "'vision_model.pre_layrnorm.weight' is missing in 'first'" in out
    assert "Task 'second'" in out


def test_evaluate_scores_a_model_of_one_s_own(desk, capsys):
    assert main(desk.words()) == 0
    assert main(["evaluate", *desk.words(), f"model={desk.folder / 'out' / 'model'}"]) == 0
    assert "model" in capsys.readouterr().out


def test_the_other_verbs_answer(capsys):
    for words, says in (
        ([], "suture method="),
        (["methods"], "task_arithmetic"),
        (["zoo"], "glyphs8"),
        (["--version"], "suture"),
    ):
        assert main(words) == 0
        assert says in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("method=ties_mergin", "Did you mean 'ties_merging'"),
        ("method=ties", "Did you mean 'ties_merging'"),
        ("method.merge_func=avrage", "'sum', 'mean' or 'max'"),
        ("method.threshold=-5", "greater than 0"),
        ("method.scaling_factor=abc", "valid number"),
        ("method.scaling_facto=0.3", "scaling_factor"),
        ("outptu=x", "output"),
        ("batch_size=0", "wanted a whole number, 1 or more, or auto"),
        ("batch_size=automatic", "or auto"),
        ("modelpool=nowhere.yaml", "there is no such file"),
        ("taskpool=glyphs9", "glyphs8"),
    ],
)
def test_an_unknown_name_or_value_is_answered_with_what_is_known(desk, capsys, word, says):
    key = word.split("=")[0]
    words = [other for other in desk.words() if not other.startswith(f"{key}=")]
    assert says in refused(capsys, [*words, word])


def test_a_group_left_out_is_answered_with_what_is_known(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "CLIPVisionModelPool/glyphs8" in refused(capsys, ["method=ties_merging"])
    assert "ties_merging" in refused(capsys, ["modelpool=glyphs8"])


def test_an_unknown_verb_is_answered_with_the_nearest(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "'check'" in refused(capsys, ["chekc"])


def test_a_missing_pretrained_model(desk, capsys):
    desk.models.pop("_pretrained_")
    assert "_pretrained_" in refused(capsys, desk.words())


def test_a_missing_tensor(desk, capsys):
    tensors = desk.tensors("first")
    tensors.pop("vision_model.pre_layrnorm.bias")
    desk.replace("first", tensors)
    assert "'vision_model.pre_layrnorm.bias' is missing in 'first'" in refused(capsys, desk.words())


def test_a_tensor_of_another_shape(desk, capsys):
    desk.replace("first", desk.tensors("first") | {"vision_model.pre_layrnorm.bias": torch.zeros(5)})
    assert "(5,) in 'first' but (16,) in the base" in refused(capsys, desk.words())


def test_a_tensor_of_another_dtype(desk, capsys):
    desk.replace("first", {name: tensor.half() for name, tensor in desk.tensors("first").items()})
    assert "float16 in 'first' but float32 in the base" in refused(capsys, desk.words())


def test_an_extra_tensor(desk, capsys):
    desk.replace("first", desk.tensors("first") | {"vision_model.more": torch.zeros(5)})
    assert "'vision_model.more'" in refused(capsys, desk.words())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(desk, capsys, bad):
    tensors = desk.tensors("first")
    tensors["vision_model.pre_layrnorm.bias"][3] = bad
    desk.replace("first", tensors)
    assert "NaN or Inf in 'first'" in refused(capsys, desk.words())


def test_a_truncated_file(desk, capsys):
    content = Path(desk.models["first"]).read_bytes()
    desk.models["first"] = str(desk.folder / "cut.safetensors")
    (desk.folder / "cut.safetensors").write_bytes(content[: len(content) // 2])
    assert "cut.safetensors" in refused(capsys, desk.words())


def test_a_pickle_that_asks_to_run_code(desk, capsys):
    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {desk.folder / 'ran'}",)

    torch.save({"weights": Hostile()}, desk.folder / "hostile.pt")
    desk.models["first"] = str(desk.folder / "hostile.pt")
    assert "system" in refused(capsys, desk.words())
    assert not (desk.folder / "ran").exists()


def test_class_names_that_do_not_fit_the_labels(desk, capsys):
    desk.tasks["first"]["classnames"] = ["zero", "one"]
    assert "first" in refused(capsys, desk.words())


def test_an_empty_dataset(desk, capsys):
    (desk.folder / "nothing").mkdir()
    desk.tasks["first"]["source"] = str(desk.folder / "nothing")
    assert "nothing" in refused(capsys, desk.words())


def test_a_full_disk(desk, capsys, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10, 10, 1000))
    assert "1.0 kB free" in refused(capsys, desk.words())


def test_an_output_folder_that_is_in_use(desk, capsys):
    (desk.folder / "out").mkdir()
    (desk.folder / "out" / "mine").write_text("precious")
    assert "out" in refused(capsys, desk.words())
    assert (desk.folder / "out" / "mine").read_text() == "precious"


def test_pickles_of_the_standard_library_are_not_taken_for_checkpoints(desk, capsys):
    (desk.folder / "list.pt").write_bytes(pickle.dumps([1, 2]))
    desk.models["first"] = str(desk.folder / "list.pt")
    assert "list.pt" in refused(capsys, desk.words())


def test_evaluate_scores_every_model_on_every_task(desk, capsys):
    desk.models["third"] = desk.models["second"]
    assert main(["evaluate", *desk.words("matrix=true", "output=scores")]) == 0
    assert "every model on every task" in capsys.readouterr().out
    report = json.loads((desk.folder / "scores" / "report.json").read_text())
    assert list(report["matrix"]) == ["first", "second", "third"]
    assert report["matrix"]["second"] == report["matrix"]["third"]
    experts = next(row["accuracies"] for row in report["rows"] if row["name"] == "experts")
    assert experts == {task: report["matrix"][task][task] for task in ("first", "second")}
    assert (desk.folder / "scores" / "figures" / "expert_matrix.png").exists()


def test_the_matrix_of_eight_tasks_fits_80_columns(capsys, monkeypatch):
    from suture.cli.tables import print_report
    from suture.evaluation import Row
    from suture.reporting import Report

    monkeypatch.setenv("COLUMNS", "80")
    names = ["operators", "stanford_cars", "cyrillic", "armenian", "georgian", "photographs", "clothing", "textures"]
    rows = [Row(name, {task: 0.1 * i + 0.005 * j for j, task in enumerate(names)}) for i, name in enumerate(names)]
    print_report(Report("evaluation", rows, matrix=rows))
    lines = capsys.readouterr().out.partition("every model on every task")[2].splitlines()
    assert max(map(len, lines)) <= 80
    numbers = [line.split()[1:] for line in lines if "." in line]
    assert numbers == [[f"{10 * i + 0.5 * j:.1f}" for j in range(8)] for i in range(8)]


def test_matrix_takes_true_or_false(desk, capsys):
    assert "matrix=yes: wanted true or false" in refused(capsys, ["evaluate", *desk.words("matrix=yes")])


def test_a_demo_into_a_folder_in_use_is_refused_before_its_story(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for words in (["demo", "--output", str(tmp_path)], ["demo", "--overwrite", "--output", str(tmp_path)]):
        assert main(words) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert str(tmp_path) in shown.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_demo_ends_with_commands_that_the_shell_finds(tmp_path, capsys, monkeypatch):
    import sys

    from suture.cli import tables
    from suture.pipeline import demo
    from suture.pipeline.results import RunResult

    monkeypatch.setattr(demo, "demo", lambda output, **options: RunResult(tmp_path / "out"))
    monkeypatch.setattr(tables, "print_run", lambda result: None)
    monkeypatch.setattr("suture.cli.actions._as_data", lambda result: {})
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "suture").touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.chdir(tmp_path)
    for path, typed in (("bin", "suture"), ("/nowhere", "bin/suture")):
        monkeypatch.setenv("PATH", str(tmp_path / path))
        assert main(["demo"]) == 0
        assert f"Next: {typed} methods ties_merging; {typed} method=" in capsys.readouterr().out


def test_a_word_that_is_missing_is_answered_with_those_that_fit(capsys):
    assert "ANALYSIS is missing: the analysis to run, one of similarity, " in refused(capsys, ["analyse"])


def test_a_pool_and_a_key_of_a_group_are_answered_with_the_nearest(desk, capsys):
    words = desk.words()
    line = refused(capsys, [*words[:2], "taskpool=glyphs9", *words[3:]])
    assert "Unknown taskpool 'glyphs9'. Did you mean 'glyphs8'?" in line
    assert "A file of your own is named with its ending, .yaml." in line
    line = refused(capsys, desk.words("methods.threshold=3"))
    assert "Unknown key 'methods.threshold'. Did you mean 'method.threshold'?" in line
