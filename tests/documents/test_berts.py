"""The page for text classifiers from its first line to its last: models, YAML files, check, run and use."""

import json
import re

import pytest
from tutorial_pages import follow, page, run_block, shown

TEXT = page("berts")


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """The folder of someone who has typed the page."""
    folder = tmp_path_factory.mktemp("berts")
    return follow(TEXT, "make_berts", folder)


def test_init_leaves_nothing_to_fill_in_and_the_file_is_the_one_on_the_page(followed):
    tasks = (followed / "tasks.yaml").read_text("utf-8")
    assert "# fill in" not in tasks
    assert shown(TEXT, "tasks:\n") in tasks


def test_the_table_on_the_page_is_the_one_that_comes_out(followed):
    rows = json.loads((followed / "first" / "report.json").read_text())["rows"]
    for task in ("mood", "topic"):
        printed = [float(value) for value in re.search(rf"^ +{task} +([\d. ]+)$", TEXT, re.M)[1].split()[:-1]]
        assert [100 * row["accuracies"][task] for row in rows] == pytest.approx(printed, abs=12), task


def test_the_model_of_a_task_is_used_as_on_the_page(followed, monkeypatch, capsys):
    monkeypatch.chdir(followed)
    wanted = run_block(TEXT, "berts")
    assert capsys.readouterr().out == wanted
