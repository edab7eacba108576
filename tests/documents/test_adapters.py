"""The page for LoRA adapters from its first line to its last: adapters, merges, YAML files, scores and use."""

import json
import re

import pytest
from safetensors import safe_open
from tutorial_pages import follow, page, run_block, shown

TEXT = page("adapters")


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """The folder of someone who has typed the page."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("adapters")
    return follow(TEXT, "make_loras", folder)


def test_the_merges_leave_a_model_and_two_adapters_of_the_ranks_on_the_page(followed):
    assert (followed / "merged" / "suture_merge.json").is_file()
    for name, rank in (("both-lora", 16), ("both-core", 8)):
        with safe_open(followed / name / "adapter_model.safetensors", "pt") as file:
            ranks = {file.get_slice(key).get_shape()[0] for key in file.keys() if "lora_A" in key}  # noqa: SIM118
        assert ranks == {rank}, name


def test_init_leaves_nothing_to_fill_in_and_the_file_is_the_one_on_the_page(followed):
    tasks = (followed / "tasks.yaml").read_text("utf-8")
    assert "# fill in" not in tasks
    assert shown(TEXT, "tasks:\n") in tasks


def test_the_table_on_the_page_is_the_one_that_comes_out(followed):
    rows = json.loads((followed / "scored" / "report.json").read_text())["rows"]
    for task in ("code", "math"):
        line = re.search(rf"^ +{task} +(.*)$", TEXT, re.M)[1]
        printed = [float(value) for value in re.sub(r" ±[\d.]+", "", line).split()[:-1]]
        assert [100 * row["accuracies"][task] for row in rows] == pytest.approx(printed, abs=15), task


def test_the_model_is_used_as_on_the_page(followed, monkeypatch, capsys):
    monkeypatch.chdir(followed)
    wanted = run_block(TEXT, "adapters")
    assert capsys.readouterr().out == wanted
