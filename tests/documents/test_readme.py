"""The README is tried: its Python runs, and its commands are ones that the command line knows."""

import re
import shlex
from pathlib import Path

import pytest

from suture.pipeline import config
from suture.pipeline.settings import Settings

README = (Path(__file__).parent.parent.parent / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)
BASES = ("zoo:glyphs8/pretrained", "openai/clip-vit-base-patch32", "google/flan-t5-base")
COMMANDS = re.findall(r"^    suture (-m )?(method=.*glyphs8)$", README, re.M)


@pytest.mark.parametrize("block", BLOCKS)
def test_python_in_the_readme_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize(("multirun", "arguments"), COMMANDS)
def test_commands_in_the_readme_compose(multirun, arguments):
    arguments = [re.sub(r",.*", "", word) if multirun else word for word in shlex.split(arguments)]
    composed = config.compose(arguments)
    Settings.from_config(composed)
    assert composed["modelpool"]["models"]["_pretrained_"] in BASES


def test_the_readme_has_code_and_commands():
    assert BLOCKS
    assert len(COMMANDS) >= 3
