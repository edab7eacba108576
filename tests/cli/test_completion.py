"""Completion, as it comes out of real shells: what a press of Tab makes of a line."""

import shutil
import subprocess

import pytest

from suture.cli.completion import names_by_context, script
from suture.cli.main import main
from suture.cli.verbs import SHELLS, VERBS

PROGRAM = "suture() { printf 'GOT<%s>\\n' \"$*\"; }"
LINES = [
    ("ana", "analyse"),
    ("analyse simi", "analyse similarity"),
    ("completion fi", "completion fish"),
    ("reproduce --ch", "reproduce --check"),
    ("method=ties_m", "method=ties_merging"),
    ("method=surgery/", "method=surgery/adamerging_surgery"),
    ("check modelp", "check modelpool="),
    ("check modelpool=gly", "check modelpool=glyphs8"),
    ("method=ties_merging method.scal", "method=ties_merging method.scaling_factor="),
    ("method=ties_merging method.merge_func=me", "method=ties_merging method.merge_func=mean"),
    ("surgery=deep surgery.ra", "surgery=deep surgery.rank="),
    ("method=dare modelpool=glyphs8 taskpool=glyp", "method=dare modelpool=glyphs8 taskpool=glyphs8"),
    ("merge vocabulary=un", "merge vocabulary=union"),
    ("check --js", "check --json"),
    ("check modelpool=own_p", "check modelpool=own_pool.yaml"),
]


@pytest.fixture
def scripts(tmp_path):
    (tmp_path / "own_pool.yaml").touch()
    for shell in SHELLS:
        (tmp_path / f"suture.{shell}").write_text(script(shell, VERBS))
    return tmp_path


def interactive(folder, shell, flags, begin):
    """A shell at a terminal; returns a function from what is typed before Tab to the line that it becomes."""
    pexpect = pytest.importorskip("pexpect", reason="pip install pexpect")
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is missing")
    child = pexpect.spawn(shell, flags, cwd=folder, encoding="utf-8", timeout=20, dimensions=(24, 200))
    child.sendline(f"{begin}; source ./suture.{shell}; {PROGRAM}; echo rea'dy'")
    child.expect("ready")

    def completed(line):
        child.send(f"suture {line}\t")
        child.expect_exact(line.split()[-1])  # it is on the screen, so the shell reads what follows as a line's end
        child.send("\r")
        child.expect(r"GOT<([^>]*)>")
        return child.match.group(1)

    return completed


def test_bash_completes(scripts):
    completed = interactive(scripts, "bash", ["--norc", "--noprofile", "-i"], "bind 'set enable-bracketed-paste off'")
    assert {line: completed(line) for line, _ in LINES} == dict(LINES)


def test_zsh_completes(scripts):
    completed = interactive(scripts, "zsh", ["-f", "-i"], "autoload -U compinit; compinit -u -D")
    assert {line: completed(line) for line, _ in LINES} == dict(LINES)


def test_fish_completes(scripts):
    if shutil.which("fish") is None:
        pytest.skip("fish is missing")
    for line, wanted in LINES:
        program = f"source suture.fish; complete -C 'suture {line}'"
        done = subprocess.run(["fish", "--no-config", "-c", program], cwd=scripts, capture_output=True, text=True)
        assert done.stdout.splitlines() == [wanted.split()[-1]], (line, done.stderr)


def test_the_command_line_prints_the_script(capsys):
    assert main(["completion", "bash"]) == 0
    assert capsys.readouterr().out == script("bash", VERBS)
    assert main(["completion"]) == 0
    assert "source <(suture completion bash)" in capsys.readouterr().out
    assert main(["completion", "basj"]) == 2
    assert "Did you mean 'bash'" in capsys.readouterr().err


def test_every_verb_and_method_is_offered():
    from suture.pipeline.methods import all_methods

    words = names_by_context(VERBS)
    assert set(VERBS) < set(words[""])
    assert set(all_methods()) < set(words["method="])
    assert all(f"method:{name}" in words for name in words["method="])
