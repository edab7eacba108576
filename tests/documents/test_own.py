"""The command-line part of the page for a module of one's own, as it is typed."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from suture.cli.main import main

ROOT = Path(__file__).parent.parent.parent
WHOLE = (ROOT / "docs" / "own.md").read_text("utf-8")
TEXT = WHOLE[WHOLE.index("## On the command line") : WHOLE.index("## Other families")]


def yaml_on_the_page(first):
    shown = re.search(rf"^    {first}(?:    .*\n)+", TEXT, re.M)[0]
    return re.sub("^    ", "", shown, flags=re.M)


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """The folder of someone who has typed that part, and filled in the files as it says."""
    folder = tmp_path_factory.mktemp("own")
    command = [sys.executable, ROOT / "examples" / "make_module.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert f"    {done.stdout}" in TEXT
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in re.findall(r"^    suture (.*)$", TEXT, re.M):
            assert main(command.split()) == 0, command
            if command.startswith("init"):
                fill_in(folder)
    return folder


def fill_in(folder):
    for file, first in (("models.yaml", "family: module\n"), ("tasks.yaml", "tasks:\n")):
        written, shown = (folder / file).read_text("utf-8"), yaml_on_the_page(first)
        kept = [line for line in written.splitlines() if line and "fill in" not in line and not line.startswith("#")]
        assert [line for line in kept if line not in shown.splitlines()] == []
        (folder / file).write_text(shown, "utf-8")


def test_the_table_on_the_page_is_the_one_that_comes_out(followed):
    rows = json.loads((followed / "first" / "report.json").read_text())["rows"]
    for task in ("moved", "turned"):
        printed = [float(value) for value in re.search(rf"^ +{task} +([\d. ]+)$", TEXT, re.M)[1].split()[:-1]]
        assert [100 * row["accuracies"][task] for row in rows] == pytest.approx(printed, abs=12), task


def test_the_weights_are_used_as_on_the_page(followed, monkeypatch, capsys):
    monkeypatch.chdir(followed)
    monkeypatch.syspath_prepend(followed)
    block, shown = re.search(r"```python\n(.*?)```\n\n    tensor\(([\d.]+)\)", TEXT, re.S).groups()
    exec(compile(block, "own.md", "exec"), {})
    assert float(re.search(r"[\d.]+", capsys.readouterr().out)[0]) == pytest.approx(float(shown), abs=0.05)
