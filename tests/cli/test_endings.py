"""How a command ends: interrupted, with nobody reading, on a full disk, or by an error of suture's own."""

import json
import os
import shlex
import subprocess
import sys

import pytest

from suture.cli import actions
from suture.cli.main import main

INTERRUPTED = """
import os, signal, sys
from suture.cli.main import main

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            try:
                os.kill(os.getpid(), signal.SIGINT)
                for _ in range(10):
                    pass
            except KeyboardInterrupt:
                if swallowed:
                    raise ImportError("lost") from None
                raise

module, swallowed = sys.argv[1], sys.argv[2] == "swallowed"
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
sys.argv[1:] = ["method=dare", "modelpool=glyphs8", "taskpool=glyphs8"]
sys.meta_path.insert(0, Interrupt())
sys.exit(main())
"""


def ended(*command, **how):
    return subprocess.run([sys.executable, *command], stderr=subprocess.PIPE, text=True, **how)


@pytest.mark.parametrize("module", ["suture.cli.grammar", "hydra", "transformers"])
@pytest.mark.parametrize("how", ["raised", "swallowed"])
def test_an_interrupt_during_an_import_is_one_line(module, how, tmp_path):
    done = ended("-c", INTERRUPTED, module, how, stdout=subprocess.PIPE, cwd=tmp_path)
    assert (done.returncode, done.stderr, done.stdout) == (130, "suture: stopped.\n", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["methods"], ["--version"]], ids=" ".join)
def test_a_closed_pipe_is_no_error(words):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        done = ended("-m", "suture", *words, stdout=pipe)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_full_disk_behind_standard_output_is_one_line():
    with open("/dev/full", "w") as full:
        done = ended("-m", "suture", "methods", stdout=full)
    assert done.returncode == 2
    assert done.stderr == "suture: The output cannot be read or written: No space left on device.\n"


def test_an_error_of_suture_s_own_is_one_line_with_a_hint(monkeypatch, capsys):
    def fail():
        raise KeyError("a\nb")

    monkeypatch.setattr(actions, "version", fail)
    assert main(["--version"]) == 1
    line = capsys.readouterr().err
    assert line.startswith("suture: KeyError: 'a\\nb'. This is a bug in suture;")
    assert line.count("\n") == 1
    assert main(["--version", "--traceback"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_the_command_in_a_report_of_pools_of_one_s_own_runs_again(desk, capsys):
    assert main([word for word in desk.words() if word != "output=out"]) == 0
    (folder,) = (desk.folder / "outputs" / "pool" / "ties_merging").iterdir()
    report = json.loads((folder / "report.json").read_text())
    assert report["command"] == "suture method=ties_merging modelpool=pool.yaml taskpool=tasks.yaml"
    assert report["config"]["choices"]["modelpool"] == "pool.yaml"
    assert main([*shlex.split(report["command"])[1:], "output=again"]) == 0
    again = json.loads((desk.folder / "again" / "report.json").read_text())
    assert again["rows"] == report["rows"]
