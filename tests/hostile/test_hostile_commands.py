"""Bad pools, tasks and words on the command line: exit code 2 and one line that says what to do, nothing else."""

import os
import random
from itertools import pairwise

import pytest
import yaml
from hostile import VALUES, cases, damaged, listing, mutated, watched

from suture.cli.main import main

NESTED = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{other}'] * 9)}]\n" for other, name in pairwise("abcdefghi")
)
DAMAGED_YAML = (
    *("", "[]", "5", "null", "a: b: c", "- 1\n- 2", "\t", "key", "{", "%YAML 9.9\n---\n", "--- 1\n--- 2\n"),
    *("? [a]\n: 1", "x: !!python/object/apply:os.system ['touch it_ran']", "x: !!binary nonsense", "x: *nowhere"),
    *("[" * 3000, NESTED, "x: &x {y: *x}"),
)
WORDS = (
    *(text for text in VALUES if isinstance(text, str) and "\0" not in text and "\ud800" not in text),
    *("null", "[1]", "{a:1}", "-1", "1e400", "nan", "9" * 400, "true", "../x", "a,b", "${oc.env:HOME}", "${x}", "'"),
    *('"', "[", "{", "a b", "~", "*", "\udcff", "x/../../y", "--help", "-", "=", "..", "/proc/self/mem/x"),
)
KEYS = (
    *(
        "method",
        "modelpool",
        "taskpool",
        "method.scaling_factor",
        "method.threshold",
        "method.weights",
        "seed",
        "output",
    ),
    *("threads", "batch_size", "overwrite", "fabric", "fabric.loggers", "surgery", "surgery.max_steps", "nonsense"),
    *("modelpool.models", "modelpool.models.first", "modelpool.family", "modelpool.frozen", "taskpool.tasks"),
    *("taskpool.tasks.first.classnames", "taskpool.tasks.first.source", "+unknown", "~method", "modelpool.root"),
)
MERGE_KEYS = (
    *("base", "models.first", "models.other", "method", "output", "dtype", "shard_size", "memory", "threads", "device"),
    *(
        "vocabulary",
        "allow_non_finite",
        "mixed_dtypes",
        "overwrite",
        "rank",
        "seed",
        "method.scaling_factor",
        "mergekit",
    ),
    *("method.remove_keys", "nonsense", "--shard", "--device", "--plan", "models"),
)
OTHERS = (
    *(["report"], ["report", "nowhere"], ["report", "."], ["report", "a" * 5000], ["report", "\udcff"], ["push"]),
    *(
        ["push", "nowhere", "a/b"],
        ["push", ".", "not an id"],
        ["analyse"],
        ["analyse", "nonsense"],
        ["zoo", "nonsense"],
    ),
    *(
        ["reproduce", "--check"],
        ["reproduce", "--check", "nowhere"],
        ["completion", "tcsh"],
        ["nonsense"],
    ),
    *(["--json"], ["--quiet", "--help"], ["evaluate", "matrix=perhaps"], ["check", "modelpool=nowhere.yaml"], [""]),
    *(["merge", "base"], ["merge", "="], ["=x"], ["methods", "x"], ["demo", "--output"], ["-x"], ["a" * 5000]),
)


def tried_command(arguments: list[str], capsys, folder) -> int:
    """Run a command; whatever is refused is refused in one line, with exit code 2 and nothing left behind."""
    before = listing(folder)
    with watched():
        code = main(arguments)
    errors = capsys.readouterr().err
    if code == 2 and not errors.strip():
        return code  # a check prints its problems as its result
    if code != 0:
        assert code == 2, errors
        assert errors.count("\n") == 1, errors
        assert errors.startswith("suture: ")
        assert errors.strip().isprintable(), errors
        assert len(errors) < 2500
        assert {path: size for path, size in listing(folder).items() if path in before} == before
        assert set(listing(folder)) <= set(before), sorted(set(listing(folder)) - set(before))
    return code


@pytest.mark.parametrize("number", cases(20, 200))
def test_pools_and_tasks_in_yaml(number, desk, capsys):
    dice = random.Random(f"yaml {number}")
    desk.words()
    name = dice.choice(("pool.yaml", "tasks.yaml"))
    file = desk.folder / name
    if dice.random() < 0.3:
        file.write_text(dice.choice(DAMAGED_YAML))
    elif dice.random() < 0.15:
        file.write_bytes(damaged(dice, file.read_bytes()))
    else:
        file.write_text(yaml.safe_dump(mutated(dice, yaml.safe_load(file.read_text()))))
    tried_command(["check", "modelpool=pool.yaml", "taskpool=tasks.yaml", "output=out"], capsys, desk.folder)
    assert not (desk.folder / "it_ran").exists()


@pytest.mark.parametrize("number", cases(20, 200))
def test_words_of_a_run(number, desk, capsys):
    dice = random.Random(f"words {number}")
    arguments = desk.words()
    key, word = dice.choice(KEYS), dice.choice(WORDS)
    arguments = [argument for argument in arguments if not argument.startswith(f"{key}=")]
    tried_command(["check", *arguments, f"{key}={word}"], capsys, desk.folder)


@pytest.mark.parametrize("number", cases(20, 200))
def test_words_of_a_merge(number, desk, capsys):
    dice = random.Random(f"merge {number}")
    words = {"base": desk.models["_pretrained_"], "models.first": desk.models["_pretrained_"]}
    words |= {"method": "task_arithmetic", "output": "out"}
    key, word = dice.choice(MERGE_KEYS), dice.choice(WORDS)
    if key == "output" and os.path.exists(word):  # what is there is another test's
        word = "a" * 5000
    extra = [key, word] if key.startswith("--") else []
    words |= {} if extra else {key: word}
    tried_command(["merge", *(f"{k}={v}" for k, v in words.items()), *extra], capsys, desk.folder)


@pytest.mark.parametrize(
    "arguments", OTHERS, ids=lambda arguments: " ".join(arguments)[:30].encode("ascii", "replace").decode()
)
def test_other_verbs(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tried_command(arguments, capsys, tmp_path) == 2
