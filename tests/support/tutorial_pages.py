"""A tutorial page, typed from its first line to its last."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from suture.cli.main import main

ROOT = Path(__file__).parent.parent.parent


def page(name):
    return (ROOT / "docs" / f"{name}.md").read_text("utf-8")


def follow(text, example, folder, after=lambda command: None):
    """Make the models with a script of the examples, then give every command of the page, in a folder."""
    command = [sys.executable, ROOT / "examples" / f"{example}.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert f"    {done.stdout}" in text
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in re.findall(r"^    suture (.*)$", text, re.M):
            assert main(command.split()) == 0, command
            after(command)
    return folder


def shown(text, first):
    """The block of the page that begins with a line, or lines, as it stands in a file."""
    return re.sub("^    ", "", re.search(rf"^    {first}(?:    .*\n)+", text, re.M)[0], flags=re.M)


def run_block(text, name):
    """Run the page's Python block, and return what the page shows below it."""
    block, output = re.search(r"```python\n(.*?)```\n\n((?:    [^\n]*\n)+)", text, re.S).groups()
    exec(compile(block, f"{name}.md", "exec"), {})
    return re.sub("^    ", "", output, flags=re.M)
