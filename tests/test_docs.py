"""The documentation's words are tried: its Python runs, its commands compose, and the site builds without a warning."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from suture import config
from suture.analysis.running import ANALYSES
from suture.pipeline import check_run

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCKS = [
    (page.name, block)
    for page in PAGES
    if page.name != "tutorial.md"  # whose blocks build on each other: test_tutorial.py
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
]
VERBS = ("analyse", "check", "demo", "evaluate", "methods", "report", "zoo")
LINES = [(page.name, line) for page in PAGES for line in re.findall(r"^    suture (.*)$", page.read_text(), re.M)]
COMMANDS = [(name, line) for name, line in LINES if re.match(rf"-m |\w+=|({'|'.join(VERBS)})\b", line)]


@pytest.mark.parametrize(("page", "block"), BLOCKS)
def test_python_in_the_docs_runs(page, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, page, "exec"), {})


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_commands_in_the_docs_are_known(page, line):
    words = shlex.split(line)
    if words[0] == "analyse":
        assert words[1] in ANALYSES
        words = [word for word in words[2:] if not word.startswith(("points=", "models=", "threshold="))]
        words = words if any(word.startswith("method=") for word in words) else ["method=simple_average", *words]
    if "=" in words[0] and "real3" not in line:
        check_run(config.compose(words))


def test_there_is_something_to_try():
    assert len(BLOCKS) >= 3
    assert len(COMMANDS) >= 8


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("material", reason="pip install 'suture[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr + done.stdout
    assert (tmp_path / "site" / "methods" / "ties_merging" / "index.html").exists()
