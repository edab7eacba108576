"""The catalogue that ships: as the code has it, and read without torch."""

import subprocess
import sys

import pytest

from suture.cli.catalogue import catalogue, described


def test_the_catalogue_agrees_with_the_code():
    assert catalogue() == described(), "run `make catalogue`"


@pytest.mark.parametrize(
    "words",
    [
        ["--version"],
        ["--help"],
        ["help", "merge"],
        ["analyse", "--help"],
        ["search", "--help"],
        ["methods"],
        ["methods", "ties"],
        ["pools"],
        ["zoo"],
        ["completion", "zsh"],
    ],
    ids=" ".join,
)
def test_what_only_explains_imports_no_torch(words):
    code = f"from suture.cli.main import main; import sys; main({words}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0
