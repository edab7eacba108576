"""The page for text classifiers from its first line to its last: models, YAML files, check, run and use."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from suture.cli.main import main

ROOT = Path(__file__).parent.parent.parent
TEXT = (ROOT / "docs" / "berts.md").read_text("utf-8")


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """The folder of someone who has typed the page."""
    folder = tmp_path_factory.mktemp("berts")
    command = [sys.executable, ROOT / "examples" / "make_berts.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert f"    {done.stdout}" in TEXT
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in re.findall(r"^    suture (.*)$", TEXT, re.M):
            assert main(command.split()) == 0, command
    return folder


def test_init_leaves_nothing_to_fill_in_and_the_file_is_the_one_on_the_page(followed):
    tasks = (followed / "tasks.yaml").read_text("utf-8")
    assert "# fill in" not in tasks
    shown = re.search(r"^    tasks:\n(?:     .*\n)+", TEXT, re.M)[0]
    assert re.sub("^    ", "", shown, flags=re.M) in tasks


def test_the_table_on_the_page_is_the_one_that_comes_out(followed):
    rows = json.loads((followed / "first" / "report.json").read_text())["rows"]
    for task in ("mood", "topic"):
        printed = [float(value) for value in re.search(rf"^ +{task} +([\d. ]+)$", TEXT, re.M)[1].split()[:-1]]
        assert [100 * row["accuracies"][task] for row in rows] == pytest.approx(printed, abs=12), task


def test_the_model_of_a_task_is_used_as_on_the_page(followed, monkeypatch, capsys):
    monkeypatch.chdir(followed)
    block, shown = re.search(r"```python\n(.*?)```\n\n((?:    [^\n]*\n)+)", TEXT, re.S).groups()
    exec(compile(block, "berts.md", "exec"), {})
    assert capsys.readouterr().out == re.sub("^    ", "", shown, flags=re.M)
