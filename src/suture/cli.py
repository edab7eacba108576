"""The command line. It adds no feature: every verb is one call that Python has too."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from suture.errors import ConfigError, SutureError, unknown_name

_HELP = """\
suture merges fine-tuned models into one and shows what that did.

  suture method=METHOD modelpool=POOL taskpool=POOL [key=value …]
                      merge, score on every task, and leave one folder with the model and a report;
                      -m with several values (method.scaling_factor=0.1,0.3) runs them all
  suture check …      the same words: what fits, what will be read, written and held; nothing is run
  suture evaluate …   modelpool=POOL taskpool=POOL [model=PATH]: score the pool's models, or one of your own;
                      matrix=true: every model on every task, and with output=FOLDER a report with a heat map
  suture merge …      base=PATH models.NAME=PATH … method=METHOD output=FOLDER: merge files of any size into a sharded
                      checkpoint, in bounded memory; killed, the same words go on. suture merge --help
  suture report RUN [RUN …] [--output PAGE] [--still]
                      the page of a finished run made anew, or one page that compares several; --still: pictures only
  suture analyse WHAT modelpool=POOL …
                      similarity, layers, trimming of the weights; interpolation, landscape, bias on a taskpool=POOL:
                      a table, and files with the figure in output=FOLDER; models=A,B looks at some of the pool
  suture reproduce    --list: published figures with their commands; --check RUN: does a run agree with them
  suture methods      every method with its knobs, defaults and paper
  suture zoo          the models that ship with suture and those it can build: suture zoo build NAME
  suture demo         the main job on the shipped models: eight experts into one
  suture --cfg job method=…   the whole configuration of a run; --help after it explains hydra's flags

Put --traceback anywhere to see where an error came from."""


_MERGE_HELP = """\
suture merge base=PATH models.NAME=PATH … method=METHOD output=FOLDER [key=value …] [--plan] [--shard i/n] [--device D]

merges checkpoints of any size into a model directory that transformers loads: sharded safetensors, configuration,
tokenizer, model card, hashes of the inputs. Inputs are files, model directories (sharded or not), hub ids, or folders
of LoRA adapters. A merge that was killed goes on where it stopped when the same words are given again.

  suture merge base=llama models.math=org/math models.code=code-lora method=ties_merging method.scope=tensor output=out
  suture merge … --plan            what is read, written and held, and how long it takes here; nothing is merged
  suture merge … --shard 2/4       the second of four processes or machines that share one output folder

method.KNOB=value sets a knob of the method (suture methods lists them): a value, a gradient over the layers
(method.scaling_factor=[0.2,0.5]), or filters: 'method.scaling_factor=[{filter:mlp,value:0.5},{value:0.3}]'

  dtype=bfloat16        of the result; by default the base's
  shard_size=5GB        the most that one file of the result holds
  memory=300MB          the most that the merge holds beside what the system caches of files
  threads=0             by default as many as torch uses
  device=cpu            or cuda, cuda:N (--device cuda): where slices are merged
  vocabulary=refuse     where vocabularies differ: base (its rows), crop, pad, or union (by token)
  allow_non_finite=[]   names of tensors in which NaN and Inf may be; * stands for anything
  mixed_dtypes=false    let the models' dtypes differ from the base's
  overwrite=false       replace an output folder that is already there
  rank=16               of adapters merged into one adapter (no base=…); by default exact, the sum of their ranks
  seed=0                of methods that draw random numbers"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or 2 after one line on standard error for bad input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in arguments
    arguments = [argument for argument in arguments if argument != "--traceback"]
    try:
        _dispatch(arguments)
    except SutureError as error:
        if traceback:
            raise
        print(f"suture: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("suture: stopped.", file=sys.stderr)
        return 130
    return 0


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments in (["--help"], ["-h"]):
        return _help()
    if arguments == ["--version"]:
        return _version()
    verb, rest = arguments[0], arguments[1:]
    if verb in _VERBS:
        return _VERBS[verb](rest)
    if "=" not in verb and not verb.startswith("-"):
        raise ConfigError(unknown_name("command", verb, [*_VERBS, "method=…"]))
    _pipeline(arguments)


def _pipeline(arguments: list[str]) -> None:
    from suture import config, pipeline
    from suture.report.sweep import summarise

    folders = [
        folder
        for folder in config.run_each(arguments, pipeline.run_configured, pipeline.check_run)
        if folder is not None
    ]
    if len(folders) > 1:
        summarise(folders)


def _help() -> None:
    from suture import config
    from suture.learned import all_methods

    print(_HELP)
    print(f"\nmethods: {', '.join(all_methods())}")
    for group in ("modelpool", "taskpool"):
        print(f"{group}s: {', '.join(config.pools(group))}; or the path of a YAML file of your own")


def _version() -> None:
    from importlib.metadata import version

    print(f"suture {version('suture')}")


def _check(arguments: list[str]) -> None:
    from suture import config, pipeline

    as_json, arguments = _flag("--json", arguments)
    found = pipeline.check_configured(config.compose(_with_default_method(arguments)))
    if as_json:
        print(json.dumps(found.__dict__, indent=2))
    else:
        from suture.report.terminal import print_preflight

        print_preflight(found)
    if found.problems:
        raise SystemExit(2)


def _evaluate(arguments: list[str]) -> None:
    from suture import config, pipeline

    model = next((a.partition("=")[2] for a in arguments if a.startswith("model=")), None)
    matrix = next((a.partition("=")[2] for a in arguments if a.startswith("matrix=")), "false")
    if matrix not in ("true", "false"):
        raise ConfigError(f"matrix={matrix}: wanted true or false.")
    arguments = [a for a in arguments if not a.startswith(("model=", "matrix="))]
    pipeline.evaluate_configured(config.compose(_with_default_method(arguments)), model, matrix == "true")


def _with_default_method(arguments: list[str]) -> list[str]:
    chosen = any(argument.startswith("method=") for argument in arguments)
    return arguments if chosen else ["method=simple_average", *arguments]


def _merge(arguments: list[str]) -> None:
    from suture import config
    from suture.files import merge_configured

    if not arguments or "--help" in arguments or "-h" in arguments:
        return print(_MERGE_HELP)
    plan, words = _flag("--plan", arguments)
    shard, words = _option("--shard", words)
    device, words = _option("--device", words)
    words += ["plan=true"] * plan + ([f"shard={shard}"] if shard else []) + ([f"device={device}"] if device else [])
    merge_configured(config.compose_merging(words))


def _analyse(arguments: list[str]) -> None:
    from suture import config
    from suture.analysis.running import ANALYSES, analyse_configured
    from suture.report.findings import print_finding

    as_json, arguments = _flag("--json", arguments)
    if not arguments or arguments[0] not in ANALYSES:
        raise ConfigError(unknown_name("analysis", arguments[0] if arguments else "", ANALYSES))
    words, options = _split_options(arguments[1:], ("models", "points", "threshold", "scope", "model"))
    for key in ("models", "points"):
        if key in options:
            options[key] = options[key].split(",")
    found, folder = analyse_configured(arguments[0], config.compose(_with_default_method(words)), options)
    if as_json:
        print(json.dumps(found.as_data() | {"folder": str(folder)}, indent=2))
    else:
        print_finding(found)
        print(f"The table and the figure are in {folder}")


def _split_options(arguments: list[str], names: tuple[str, ...]) -> tuple[list[str], dict[str, Any]]:
    """The words for hydra, and those that belong to the verb."""
    pairs = [argument.partition("=")[::2] for argument in arguments]
    words = [word for word, (key, _) in zip(arguments, pairs, strict=True) if key not in names]
    return words, {key: value for key, value in pairs if key in names}


def _report(arguments: list[str]) -> None:
    from suture.report import report

    output, rest = _option("--output", arguments)
    still, rest = _flag("--still", rest)
    if unknown := next((word for word in rest if word.startswith("-")), None):
        raise ConfigError(unknown_name("option of suture report", unknown, ["--output", "--still"]))
    print(f"The page is {report(rest, output, interactive=not still)}")


def _reproduce(arguments: list[str]) -> None:
    from suture.report.terminal import print_compared, print_published
    from suture.reproduce import compare, published

    run, rest = _option("--check", arguments)
    listed, rest = _flag("--list", rest)
    _no_more(rest)
    if run is None and not listed:
        raise ConfigError("Wanted: suture reproduce --list, or suture reproduce --check RUN.")
    if listed:
        print_published(published())
    if run is not None:
        found = compare(run)
        if not found:
            raise ConfigError(
                f"'{run}' is no run of a published figure. Remedy: suture reproduce --list has the commands."
            )
        print_compared(found)
        if not all(one.within for one in found):
            raise SystemExit(1)


def _methods(arguments: list[str]) -> None:
    from suture.report.terminal import print_methods

    _no_more(arguments)
    print_methods()


def _zoo(arguments: list[str]) -> None:
    from suture import zoo

    if not arguments:
        for name, line in zoo.inventory().items():
            print(f"{name}  {line}")
        return
    if arguments[0] != "build":
        raise ConfigError(unknown_name("zoo command", arguments[0], ["build"]))
    output, rest = _option("--output", arguments[1:])
    seed, rest = _option("--seed", rest)
    data, rest = _option("--data", rest)
    if len(rest) != 1:
        raise ConfigError("Wanted: suture zoo build NAME [--output DIR] [--seed N] [--data DIR].")
    if seed is not None and not seed.isdecimal():
        raise ConfigError(f"--seed {seed}: wanted a whole number.")
    options = {} if data is None else {"data": data}
    built = zoo.build(rest[0], Path(output) if output else None, seed=int(seed or 0), **options)
    print(f"Built {rest[0]} in {built}")


def _demo(arguments: list[str]) -> None:
    from suture import pipeline

    output, rest = _option("--output", arguments)
    _no_more(rest)
    pipeline.demo(Path(output) if output else None)


def _flag(name: str, arguments: list[str]) -> tuple[bool, list[str]]:
    return name in arguments, [argument for argument in arguments if argument != name]


def _option(name: str, arguments: list[str]) -> tuple[str | None, list[str]]:
    """The value after `name` (or name=value), and the arguments without it."""
    for i, argument in enumerate(arguments):
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2], arguments[:i] + arguments[i + 1 :]
        if argument == name:
            if i + 1 == len(arguments):
                raise ConfigError(f"{name} wants a value.")
            return arguments[i + 1], arguments[:i] + arguments[i + 2 :]
    return None, arguments


def _no_more(arguments: list[str]) -> None:
    if arguments:
        raise ConfigError(f"Unexpected argument {arguments[0]!r}. See suture --help.")


_VERBS: dict[str, Callable[[list[str]], Any]] = {
    "check": _check,
    "evaluate": _evaluate,
    "merge": _merge,
    "analyse": _analyse,
    "report": _report,
    "methods": _methods,
    "reproduce": _reproduce,
    "zoo": _zoo,
    "demo": _demo,
}


if __name__ == "__main__":
    sys.exit(main())
