"""The tests with real open_clip and timm run in a process of their own; see `vision_libraries`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import vision_libraries

TESTS = Path(__file__).parent.parent


@pytest.mark.skipif(not vision_libraries.FOLDER.is_dir(), reason="open_clip and timm are not there; make test sets up")
@pytest.mark.parametrize("file", sorted(path.name for path in (TESTS / "vision").glob("check_*.py")))
def test_with_the_real_library(file):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "vision_libraries", str(TESTS / "vision" / file)]
    environment = os.environ | {"PYTHONPATH": f"{TESTS / 'support'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
