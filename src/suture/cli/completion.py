"""Completion in a shell: a script that holds all words, so that a press of Tab starts no Python."""

from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import Any, Literal, get_args, get_origin

from suture.core.knobs import Knobs

SHELLS = ("bash", "zsh", "fish")
HELP = """\
suture completion bash|zsh|fish

prints a script that completes verbs, methods with their knobs, pools and keys. To have it in every new shell:

  bash   suture completion bash > ~/.local/share/bash-completion/completions/suture
  zsh    suture completion zsh > ~/.zfunc/_suture     with fpath+=~/.zfunc before compinit in ~/.zshrc
  fish   suture completion fish > ~/.config/fish/completions/suture.fish

and to try it at once: source <(suture completion bash). The words are those of the version that printed it."""

_RUN_KEYS = (
    *("method=", "modelpool=", "taskpool=", "surgery=", "output=", "seed=", "batch_size=", "threads=", "overwrite="),
    *("dry_run=", "fast_dev_run=", "fabric.accelerator=", "fabric.devices=", "fabric.precision="),
    *("fabric.loggers.kind=", "fabric.loggers.root_dir=", "fabric.loggers.name="),
)


def script(shell: str) -> str:
    """The completion script of a shell: its template with all words in it."""
    template = (files("suture.cli") / "shells" / f"suture.{shell}").read_text("utf-8")
    contexts: dict[tuple[str, ...], list[str]] = {}
    for context, words in words_by_context().items():
        contexts.setdefault(words, []).append(f"'{context}'")
    line = _fish_case if shell == "fish" else _case
    return template.replace("@WORDS@", "\n".join(line(names, " ".join(words)) for words, names in contexts.items()))


@cache
def words_by_context() -> dict[str, tuple[str, ...]]:
    """What may be typed: "" at the start, a verb after it, `KEY=` before a value, `method:NAME` its knobs.

    >>> "ties_merging" in words_by_context()["method="]
    True
    """
    from suture.pipeline.analyse import ANALYSES
    from suture.pipeline.config import pools
    from suture.pipeline.methods import all_methods
    from suture.pipeline.repairs import KINDS, Repair

    found: dict[str, tuple[str, ...]] = {"": (*_verbs(), *_RUN_KEYS, "-m", "--cfg", "--help", "--version")}
    for verb in ("check", "evaluate", "run"):
        found[verb] = (*_RUN_KEYS, *_OPTIONS.get(verb, ()))
    found["analyse"] = (*ANALYSES, *_RUN_KEYS, *_OPTIONS["analyse"])
    found |= {verb: words for verb, words in _OPTIONS.items() if verb not in found}
    found["surgery="] = ("none", *KINDS)
    for group in ("modelpool", "taskpool"):
        found[f"{group}="] = tuple(dict.fromkeys(name.split("/")[-1] for name in pools(group)))
    methods = all_methods()
    found["method="] = tuple(name for m in methods.values() for name in (m.name, *m.aliases))
    for method in methods.values():
        for name in (method.name, *method.aliases):
            found[f"method:{name}"] = tuple(f"method.{knob}=" for knob in method.knobs.defaults)
        found |= dict(_values(method.knobs))
    for kind in KINDS:
        found[f"surgery:{kind}"] = tuple(f"surgery.{knob}=" for knob in Repair.defaults(kind) if knob != "kind")
    return found


_OPTIONS: dict[str, tuple[str, ...]] = {
    "evaluate": ("model=", "matrix=true"),
    "analyse": ("models=", "points=", "threshold=", "scope=", "model="),
    "merge": (
        *("base=", "models.", "method=", "output=", "mergekit=", "dtype=", "shard_size=", "memory=", "threads="),
        *("device=", "vocabulary=", "allow_non_finite=", "mixed_dtypes=", "overwrite=", "rank=", "seed="),
        *("--plan", "--shard"),
    ),
    "push": ("--private", "--revision"),
    "report": ("--output", "--still"),
    "reproduce": ("--list", "--check"),
    "zoo": (),
    "demo": ("--output",),
    "completion": SHELLS,
    "vocabulary=": ("refuse", "base", "crop", "pad", "union"),
    "dtype=": ("bfloat16", "float16", "float32"),
    "scope=": ("model", "tensor"),
    "fabric.loggers.kind=": ("csv", "tensorboard", "mlflow", "wandb", "none"),
    "fabric.precision=": ("32-true", "bf16-mixed"),
    **dict.fromkeys(("overwrite=", "dry_run=", "fast_dev_run=", "mixed_dtypes="), ("true", "false")),
}


def _verbs() -> tuple[str, ...]:
    from suture.cli.main import VERBS

    return tuple(VERBS)


def _values(knobs: Knobs) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The values that a knob may take, where its type names them all."""
    for knob, annotation in knobs.annotations.items():
        if values := _named(annotation):
            yield f"method.{knob}=", values


def _named(annotation: Any) -> tuple[str, ...]:
    if annotation is bool:
        return ("true", "false")
    if get_origin(annotation) is Literal:
        return tuple(map(str, get_args(annotation)))
    return ()


def _case(contexts: list[str], words: str) -> str:
    return f"        {' | '.join(contexts)}) echo '{words}' ;;"


def _fish_case(contexts: list[str], words: str) -> str:
    return f"        case {' '.join(contexts)}\n            string split ' ' -- '{words}'"
