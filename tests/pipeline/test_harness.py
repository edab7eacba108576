"""lm-evaluation-harness as a bridge: its results to the last digit, and our own scores against its on the same data."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from desk import refused
from language_shop import build_shop, write_pools

from suture.cli.main import main
from suture.evaluation.rows import Row
from suture.pipeline.harness import _of_row

needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed")


def test_the_harness_is_refused_without_its_package_or_tasks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shop = build_shop(tmp_path / "shop")
    capsys.readouterr()  # progress bars of transformers
    words = ["method=simple_average", *write_pools(shop, tmp_path), "output=out"]
    assert "evaluate.harness=lm_eval" in refused(capsys, [*words, "evaluate.tasks=[gsm8k]"])
    assert "names no task" in refused(capsys, [*words, "evaluate.harness=lm_eval"])
    assert "lm_eval" in refused(capsys, [*words, "evaluate.harness=lm_evil", "evaluate.tasks=[gsm8k]"])
    line = refused(capsys, [*words, "evaluate.harness=lm_eval", "evaluate.tasks=[no_such_task]"])
    missing = "pip install 'suture[lm_eval]'" if find_spec("lm_eval") is None else "no_such_task"
    assert missing in line
    assert len(line) < 400  # the harness has thousands of tasks


def test_the_experts_row_has_the_best_expert_of_each_task():
    def results(value, bits):
        return {"results": {"quiz": {"acc,none": value, "acc_stderr,none": 0.1}, "text": {"bits_per_byte,none": bits}}}

    experts = {"one": results(0.5, 2.0), "two": results(0.7, 3.0)}
    best = _of_row(Row("experts", {}, role="experts"), {}, experts)
    assert best["quiz"]["acc"] == (0.7, 0.1)
    assert best["text"]["bits_per_byte"][0] == 2.0


def task_files(folder, data):
    shared = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    quiz = {"task": "endings", "output_type": "multiple_choice", "doc_to_text": "{{beginning}}"}
    quiz |= {"doc_to_choice": "{{endings}}", "doc_to_target": "answer"}
    measures = {"acc": True, "acc_norm": True, "acc_bytes": True}
    quiz["metric_list"] = [{"metric": m, "aggregation": "mean", "higher_is_better": b} for m, b in measures.items()]
    text = {"task": "sentences", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    text["metric_list"] = [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")]
    folder.mkdir()
    for version, task in enumerate((quiz, text), start=1):
        content = {**shared, **task, "metadata": {"version": float(version)}}
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(content))
    return folder


@needs_harness
@pytest.mark.filterwarnings("ignore")  # the harness and its libraries warn
def test_the_bridge_gives_what_the_harness_gives_and_our_own_scores_agree(tmp_path, monkeypatch):
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shop = build_shop(tmp_path / "shop")
    files = task_files(tmp_path / "tasks", shop / "data" / "colour" / "test.jsonl")
    words = ["evaluate.harness=lm_eval", "evaluate.tasks=[endings,sentences]", f"evaluate.include_path={files}"]
    pools = write_pools(shop, tmp_path, {"colour": "choice", "animal": "text"})
    assert main(["method=task_arithmetic", *pools, "output=out", *words]) == 0
    report = json.loads(Path("out/report.json").read_text())
    harness, rows = report["harness"], {row["name"]: row for row in report["rows"]}
    by_hand = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": "out/model"},
        tasks=["endings", "sentences"],
        task_manager=TaskManager(include_path=str(files), include_defaults=False),
        batch_size=8,
        device="cpu",
        log_samples=False,
    )
    for task, values in by_hand["results"].items():
        for key, value in values.items():
            assert harness["results"]["task_arithmetic"][task][key] == value
    assert harness["task_versions"] == {"endings": 1.0, "sentences": 2.0}
    assert harness["version"] == lm_eval.__version__
    assert rows["task_arithmetic"]["accuracies"]["endings"] == by_hand["results"]["endings"]["acc_norm,none"]

    ours, theirs = rows["task_arithmetic"]["details"], by_hand["results"]
    assert ours["colour"]["acc"][0] == theirs["endings"]["acc,none"]
    assert ours["colour"]["acc_norm"][0] == theirs["endings"]["acc_bytes,none"]
    assert ours["colour"]["acc_chars"][0] == theirs["endings"]["acc_norm,none"]
    assert ours["colour"]["acc"][1] == pytest.approx(theirs["endings"]["acc_stderr,none"])

    files = task_files(tmp_path / "again", shop / "data" / "animal" / "test.jsonl")
    text = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": "out/model"},
        tasks=["sentences"],
        task_manager=TaskManager(include_path=str(files), include_defaults=False),
        batch_size=8,
        device="cpu",
        log_samples=False,
    )
    for name in ("bits_per_byte", "byte_perplexity", "word_perplexity"):
        found = rows["task_arithmetic"]["details"]["animal"][name][0]
        assert found == pytest.approx(text["results"]["sentences"][f"{name},none"], rel=1e-5)
