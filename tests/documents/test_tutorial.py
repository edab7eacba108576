"""The tutorial from its first line to its last, as a page and as a notebook; runs on the zoo are shortened."""

import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import pytest
import small_zoo

from suture.cli.main import main

ROOT = Path(__file__).parent.parent.parent
PAGE, NOTEBOOK = ROOT / "docs" / "tutorial.md", ROOT / "examples" / "tutorial.ipynb"
TEXT = PAGE.read_text("utf-8")


def maker():
    spec = importlib.util.spec_from_file_location("make_notebook", ROOT / "docs" / "notebook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """The folder of someone who has typed the page from top to bottom."""
    pytest.importorskip("sklearn", reason="pip install 'suture[zoo]'")
    folder, names = tmp_path_factory.mktemp("tutorial"), {"__name__": "page"}
    pools = small_zoo.write_pools(tmp_path_factory.mktemp("zoo"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for python, command in re.findall(r"```python\n(.*?)```|^    suture ([^\n]*)$", TEXT, re.S | re.M):
            if python:
                exec(compile(python, "tutorial.md", "exec"), names)
            else:
                assert main(small_zoo.shortened(command, pools)) == 0, command
    return folder


def test_every_line_of_the_tutorial_runs(followed):
    left = ["first/report.html", "second/report.html", "third/surgery.safetensors", "comparison.html"]
    left += ["own/merged/model.safetensors", "own/report/report.html", "own/surgery.safetensors"]
    assert [name for name in left if not (followed / name).is_file()] == []


def test_the_tutorial_prints_the_accuracies_that_come_out(followed):
    printed = dict(re.findall(r"^\| ([\w +]+) \| ([\d. |]+) \|$", TEXT, re.M))
    report = json.loads((followed / "own" / "report" / "report.json").read_text())
    for row in report["rows"]:
        upright, turned, mean, _ = map(float, printed.pop(row["name"]).split(" | "))
        accuracies = [100 * value for value in (*row["accuracies"].values(), row["mean"])]
        assert accuracies == pytest.approx([upright, turned, mean], abs=4), row["name"]
    assert printed == {}
    means = [row["mean"] for row in report["rows"] if row["name"] != "experts"]
    assert means == sorted(means)


def test_the_notebook_is_the_page():
    assert json.loads(NOTEBOOK.read_text("utf-8")) == maker().notebook(TEXT), "python docs/notebook.py makes it anew"


@pytest.mark.parametrize("cells", ["its own", pytest.param("all", marks=pytest.mark.slow)])
def test_the_notebook_runs(cells, tmp_path, monkeypatch):
    """Cells with commands on the zoo are slow, and the same as on the page."""
    nbclient = pytest.importorskip("nbclient", reason="pip install nbclient ipykernel")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    book = nbformat.read(NOTEBOOK, as_version=4)
    if cells != "all":
        book.cells = [
            cell for cell in book.cells if "glyphs8" not in cell.source and "!suture report" not in cell.source
        ]
    nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "own" / "report" / "report.html").is_file()
    assert (tmp_path / "own" / "merged" / "model.safetensors").is_file()
    assert (tmp_path / "comparison.html").is_file() == (cells == "all")
    assert "Open own/report/report.html" in str(book.cells)
