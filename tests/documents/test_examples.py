"""Every example runs as it stands."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def run(name, folder, *words):
    command = [sys.executable, EXAMPLES / f"{name}.py", *map(str, words)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_checkpoints_of_one_s_own_are_merged(tmp_path):
    base, one, other = (nn.Linear(3, 2) for _ in range(3))
    for name, module in (("base", base), ("one", one), ("other", other)):
        torch.save(module.state_dict(), tmp_path / f"{name}.pt")
    assert "2 tensors" in run("merge_two", tmp_path, "base.pt", "one.pt", "other.pt", "out.safetensors")
    assert (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "says"), [("adamerging_module", "objective"), ("surgery_classifier", "torch.Size([32, 32])")]
)
def test_a_module_of_one_s_own_is_adapted_and_repaired(tmp_path, name, says):
    assert says in run(name, tmp_path)


@pytest.mark.slow
def test_the_sweep_is_one_page(tmp_path):
    run("sweep", tmp_path, "fast_dev_run=true")
    assert (tmp_path / "sweep" / "comparison.html").exists()


def test_no_example_is_forgotten():
    tried = {"merge_two", "adamerging_module", "surgery_classifier", "sweep"}
    by_the_tutorials = {"make_berts", "make_loras", "make_module"}  # test_berts.py, test_adapters.py, test_own.py
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tried | by_the_tutorials
