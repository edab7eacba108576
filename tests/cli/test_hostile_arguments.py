"""Hostile arguments: each is refused in one line with exit code 2, and none runs code."""

import sys

import pytest
from desk import refused
from hydra._internal.utils import get_args_parser

from suture.cli.overrides import check_overrides
from suture.cli.verbs import VERBS

POOLS = ["modelpool=glyphs8", "taskpool=glyphs8"]
RUN = ["method=simple_average", *POOLS]
MERGE = ["merge", "base=x", "models.a=y", "method=dare", "output=o"]
LONG = "a" * 5000

REFUSED = {
    "output=-1": [*RUN, "output=-1"],
    "output=/": [*RUN, "output=/", "overwrite=true"],
    "output=.": [*RUN, "output=.", "overwrite=true"],
    "output=long": [*RUN, f"output={LONG}"],
    "output=bytes": [*RUN, "output=\udcff"],
    "modelpool=long": ["method=dare", f"modelpool={LONG}"],
    "modelpool=long.yaml": ["method=dare", f"modelpool={LONG}.yaml"],
    "model=long": ["evaluate", *POOLS, f"model={LONG}"],
    "report long": ["report", LONG],
    "push long": ["push", LONG, "org/name"],
    "method=null": ["method=null", *POOLS],
    "method=[1]": ["method=[1]", *POOLS],
    "surgery=3": [*RUN, "surgery=3"],
    "fabric=''": [*RUN, "fabric=''"],
    "fabric=null": [*RUN, "fabric=null"],
    "fabric.loggers=true": [*RUN, "fabric.loggers=true"],
    "+unknown=1": [*RUN, "+unknown=1"],
    "=x": [*RUN, "=x"],
    "~method": [*RUN, "~method"],
    "remove_keys=null": ["method=ties_merging", *POOLS, "method.remove_keys=null"],
    "weights=[]": ["method=adamerging", *POOLS, "method.weights=[]"],
    "threads": [*RUN, "threads=10000000000000000000"],
    "seed": [*RUN, "seed=10000000000000000000"],
    "overwrite=3": [*RUN, "overwrite=3"],
    "models=3": [*RUN, "modelpool.models=3"],
    "tasks=3": [*RUN, "taskpool.tasks=3"],
    "task=3": [*RUN, "taskpool.tasks.latin=3"],
    "memory": [*MERGE, f"memory={'9' * 400}"],
    "merge threads": [*MERGE, "threads=10000000000000000000"],
    "allow_non_finite=null": [*MERGE, "allow_non_finite=null"],
    "merge +unknown=1": [*MERGE, "+unknown=1"],
    "--shard": [*MERGE, "--shard"],
    "--plan=3": [*MERGE, "--plan=3"],
    "analyse a file": ["analyse", "landscape", *POOLS, "models=latin,greek", "output=pool.yaml"],
}


@pytest.mark.parametrize("words", REFUSED.values(), ids=REFUSED)
def test_a_hostile_argument_is_refused_in_one_line(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pool.yaml").write_text("")
    line = refused(capsys, words)
    assert len(line) < 2000
    assert "This is a bug in suture" not in line


@pytest.mark.parametrize(
    "content", [b"", b"5", b"[]", b"\xff", b"a: [", b"defaults: [{/hydra/launcher: basic}]"], ids=repr
)
def test_a_file_that_holds_no_pool_is_refused_by_name(content, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pool.yaml").write_bytes(content)
    assert "modelpool=pool.yaml" in refused(capsys, ["method=dare", "modelpool=pool.yaml"])


@pytest.fixture
def hostile_code(tmp_path, monkeypatch):
    """A module on the path, and a configuration that names it; afterwards it must not have been imported."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hostile_code.py").write_text("def run(*arguments, **settings): pass\n")
    (tmp_path / "pool.yaml").write_text("# @package hydra.launcher\n_target_: hostile_code.run\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    assert "hostile_code" not in sys.modules


OUTSIDE = "/".join([".."] * 20)
CODE = [
    ["-m", "hydra.launcher._target_=hostile_code.run"],
    ["-m", "hydra.launcher={_target_: hostile_code.run}"],
    ["-m", "++hydra.sweeper._target_=hostile_code.run"],
    ["-m", "hydra.launcher=${oc.create:'{\"_t\\x61rget_\": hostile_code.run}'}"],
    ["-m", "hydra.launcher.x=${oc.create:'{}'}"],
    ["-m", f"hydra/launcher={OUTSIDE}FOLDER/pool"],
    ["-m", f"modelpool={OUTSIDE}FOLDER/pool"],
    ["-m", f"modelpool=choice({OUTSIDE}FOLDER/pool.yaml)"],
    ["-m", f"modelpool=[{OUTSIDE}FOLDER/pool.yaml]"],
    ["-m", "modelpool@hydra.launcher=pool.yaml"],
    ["-m", f"+method/surgery={OUTSIDE}FOLDER/pool"],
    ["-m", f"+modelpool/CLIPVisionModelPool={OUTSIDE}FOLDER/pool.yaml"],
    ["-m", "+modelpool@hydra.launcher=pool.yaml"],
    ["+hydra.callbacks.one={_target_: hostile_code.run}"],
    ["hydra.searchpath=[file://FOLDER]"],
    ["hydra/job_logging=default"],
    ["hydra.job_logging={version: 1}"],
    ["hydra.job.env_set.PYTHONPATH=FOLDER"],
]


@pytest.mark.parametrize("words", CODE, ids=" ".join)
def test_no_key_of_hydra_s_runs_code(words, hostile_code, capsys):
    refused(capsys, [*RUN, "dry_run=true", *(word.replace("FOLDER", str(hostile_code)) for word in words)])


def test_a_folder_may_have_target_in_its_name():
    check_overrides(["output=my_target_model", "hydra.sweep.dir=my_target_/x"], "config")


def test_a_pool_with_a_header_of_hydra_s_is_a_pool(hostile_code, capsys):
    assert "_target_" in refused(capsys, ["-m", "method=simple_average", "modelpool=pool.yaml"])


def test_only_the_options_of_hydra_that_the_table_has_are_reachable(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours = {name for option in VERBS["run"].options if not option.key for name in option.names} | {
        "-h",
        "--help",
        "--version",
    }
    theirs = {name for action in get_args_parser()._actions for name in action.option_strings}
    assert ours - {"--plan"} <= theirs
    assert {"--experimental-rerun", "--config-dir", "--config-path", "--shell-completion"} <= theirs - ours
    for name in theirs - ours:
        assert "Unknown" in refused(capsys, [name, *RUN])
