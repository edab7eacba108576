"""Commands on the zoo made short: two of its eight models, a few inputs, loops of a few steps."""

import re
import shlex

import yaml

from suture.pipeline import config

TWO = ("latin", "cyrillic")


def write_pools(folder):
    """Pools of two of the zoo's models and their tasks."""
    whole = config.compose(["method=simple_average", "modelpool=glyphs8", "taskpool=glyphs8"])
    models = {name: whole["modelpool"]["models"][name] for name in ("_pretrained_", *TWO)}
    tasks = {name: whole["taskpool"]["tasks"][name] for name in TWO}
    pools = {"modelpool": {**whole["modelpool"], "models": models}, "taskpool": {**whole["taskpool"], "tasks": tasks}}
    for group, pool in pools.items():
        (folder / f"{group}.yaml").write_text(yaml.safe_dump(pool))
    return folder


def shortened(line, folder):
    """The words of a line; those of a run on the zoo are made short."""
    if "glyphs8" not in line:
        return shlex.split(line)
    line = re.sub(r"(modelpool|taskpool)=glyphs8", rf"\1={folder}/\1.yaml", line)
    more = ["points=0,1"] if "landscape" in line else []
    return [
        *(word for word in shlex.split(line) if word != "fast_dev_run=true"),
        "fast_dev_run=true",
        "batch_size=24",
        *more,
    ]
