"""The command-line part of the page for a module of one's own, as it is typed."""

import json
import re

import pytest
from tutorial_pages import follow, page, shown

WHOLE = page("own")
TEXT = WHOLE[WHOLE.index("## On the command line") : WHOLE.index("## Other families")]


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """The folder of someone who has typed that part, and filled in the files as it says."""
    folder = tmp_path_factory.mktemp("own")

    def fill_in_after(command):
        if command.startswith("init"):
            fill_in(folder)

    return follow(TEXT, "make_module", folder, fill_in_after)


def fill_in(folder):
    for file, first in (("models.yaml", "family: module\n"), ("tasks.yaml", "tasks:\n")):
        written, wanted = (folder / file).read_text("utf-8"), shown(TEXT, first)
        kept = [line for line in written.splitlines() if line and "fill in" not in line and not line.startswith("#")]
        assert [line for line in kept if line not in wanted.splitlines()] == []
        (folder / file).write_text(wanted, "utf-8")


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
