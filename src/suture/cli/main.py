"""The command line. It adds no feature: every verb is one call that Python has too."""

import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from suture import __version__
from suture.cli.output import Answer, Manner
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
  suture push RUN org/name [--private] [--revision BRANCH]
                      a finished run's model to the hub, with a model card, in one commit
  suture analyse WHAT modelpool=POOL …
                      similarity, layers, trimming of the weights; interpolation, landscape, bias on a taskpool=POOL:
                      a table, and files with the figure in output=FOLDER; models=A,B looks at some of the pool
  suture reproduce    --list: published figures with their commands; --check RUN: does a run agree with them
  suture methods      every method with its knobs, defaults and paper
  suture zoo          the models that ship with suture and those it can build: suture zoo build NAME
  suture demo         the main job on the shipped models: eight experts into one
  suture completion   bash, zsh or fish: the script that completes all these words; suture completion --help
  suture --cfg job method=…   the whole configuration of a run; --help after it explains hydra's flags

Anywhere: --json for one JSON document instead of tables, --quiet for the result alone (a folder, a page, names),
--traceback to see where an error came from."""


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
    """Run one command; returns the exit code: 0, 1 for a figure that disagrees, 2 after one line for bad input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    traceback, arguments = _flag("--traceback", arguments)
    try:
        manner, arguments = _manner(arguments)
        with manner.while_working():
            answer = _dispatch(arguments)
    except SutureError as error:
        if traceback:
            raise
        print(f"suture: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("suture: stopped.", file=sys.stderr)
        return 130
    if answer is None:
        return 0
    manner.tell(answer)
    return answer.code


def _manner(arguments: list[str]) -> tuple[Manner, list[str]]:
    """How to answer, and the other words. What is only text (help, hydra's own flags) comes as it is."""
    for manner in (Manner.JSON, Manner.QUIET):
        asked, arguments = _flag(manner.value, arguments)
        if not asked:
            continue
        others = [word for word in arguments if word in (*_TEXT, "--json", "--quiet")]
        if others or not arguments:
            raise ConfigError(f"{manner.value} does not go with {others[0] if others else 'the help'}.")
        return manner, arguments
    return Manner.TABLES, arguments


def _dispatch(arguments: list[str]) -> Answer | None:
    if not arguments or arguments in (["--help"], ["-h"]):
        return _help()
    if arguments == ["--version"]:
        return _version()
    verb, rest = arguments[0], arguments[1:]
    if verb in VERBS:
        return VERBS[verb](rest)
    if "=" not in verb and not verb.startswith("-"):
        raise ConfigError(unknown_name("command", verb, [*VERBS, "method=…"]))
    return _pipeline(arguments)


def _pipeline(arguments: list[str]) -> Answer:
    from suture.pipeline import config, pipeline
    from suture.reporting.sweep import summarise

    results = config.run_each(arguments, pipeline.run_configured, pipeline.check_run)
    folders = [result for result in results if isinstance(result, Path)]
    if len(folders) > 1:
        summarise(folders)
    told = [_told(result) if isinstance(result, Path) else asdict(result) for result in results]
    return Answer(told[0] if len(told) == 1 else {"runs": told}, "\n".join(map(str, folders)))


def _told(folder: Path) -> dict[str, Any]:
    """The folder of a run, and what its report holds."""
    return {"folder": str(folder), **json.loads((folder / "report.json").read_text("utf-8"))}


def _help() -> None:
    from suture.pipeline import config
    from suture.pipeline.methods import all_methods

    print(_HELP)
    print(f"\nmethods: {', '.join(all_methods())}")
    for group in ("modelpool", "taskpool"):
        print(f"{group}s: {', '.join(config.pools(group))}; or the path of a YAML file of your own")


def _version() -> Answer:
    print(f"suture {__version__}")
    return Answer({"version": __version__}, __version__)


def _check(arguments: list[str]) -> Answer:
    from suture.cli.tables import print_preflight
    from suture.pipeline import config, pipeline

    found = pipeline.check_configured(config.compose(_with_default_method(arguments)))
    print_preflight(found)
    return Answer(asdict(found), "\n".join(found.problems), 2 if found.problems else 0)


def _evaluate(arguments: list[str]) -> Answer:
    from suture.pipeline import config, pipeline

    model = next((a.partition("=")[2] for a in arguments if a.startswith("model=")), None)
    matrix = next((a.partition("=")[2] for a in arguments if a.startswith("matrix=")), "false")
    if matrix not in ("true", "false"):
        raise ConfigError(f"matrix={matrix}: wanted true or false.")
    arguments = [a for a in arguments if not a.startswith(("model=", "matrix="))]
    composed = config.compose(_with_default_method(arguments))
    report = pipeline.evaluate_configured(composed, model, matrix == "true")
    data = report.as_data()
    shown = {key: data[key] for key in ("tasks", "samples", "rows", "matrix")} | {"folder": composed["output"]}
    return Answer(shown, "\n".join(f"{row.name}\t{100 * row.mean:.2f}" for row in report.rows))


def _with_default_method(arguments: list[str]) -> list[str]:
    chosen = any(argument.startswith("method=") for argument in arguments)
    return arguments if chosen else ["method=simple_average", *arguments]


def _merge(arguments: list[str]) -> Answer | None:
    from suture.file_merge import merge_configured
    from suture.pipeline import config

    if not arguments or "--help" in arguments or "-h" in arguments:
        return print(_MERGE_HELP)
    plan, words = _flag("--plan", arguments)
    shard, words = _option("--shard", words)
    device, words = _option("--device", words)
    words += ["plan=true"] * plan + ([f"shard={shard}"] if shard else []) + ([f"device={device}"] if device else [])
    result = merge_configured(config.compose_merging(words), shlex.join(["suture", *sys.argv[1:]]))
    print(*(f"note: {note}" for note in result.notes), result, sep="\n")
    if result.plan is None:
        return Answer({"output": str(result.output), "finished": result.finished}, str(result.output))
    return Answer(asdict(result.plan) | {"seconds": result.plan.seconds}, str(result.plan))


def _analyse(arguments: list[str]) -> Answer:
    from suture.cli.tables import print_finding
    from suture.pipeline import config
    from suture.pipeline.analyse import ANALYSES, analyse_configured

    if not arguments or arguments[0] not in ANALYSES:
        raise ConfigError(unknown_name("analysis", arguments[0] if arguments else "", ANALYSES))
    words, options = _split_options(arguments[1:], ("models", "points", "threshold", "scope", "model"))
    for key in ("models", "points"):
        if key in options:
            options[key] = options[key].split(",")
    found, folder = analyse_configured(arguments[0], config.compose(_with_default_method(words)), options)
    print_finding(found)
    print(f"The table and the figure are in {folder}")
    return Answer(found.as_data() | {"folder": str(folder)}, str(folder))


def _split_options(arguments: list[str], names: tuple[str, ...]) -> tuple[list[str], dict[str, Any]]:
    """The words for hydra, and those that belong to the verb."""
    pairs = [argument.partition("=")[::2] for argument in arguments]
    words = [word for word, (key, _) in zip(arguments, pairs, strict=True) if key not in names]
    return words, {key: value for key, value in pairs if key in names}


def _report(arguments: list[str]) -> Answer:
    from suture.reporting import report

    output, rest = _option("--output", arguments)
    still, rest = _flag("--still", rest)
    if unknown := next((word for word in rest if word.startswith("-")), None):
        raise ConfigError(unknown_name("option of suture report", unknown, ["--output", "--still"]))
    page = report(rest, output, interactive=not still)
    print(f"The page is {page}")
    return Answer({"page": str(page)}, str(page))


def _push(arguments: list[str]) -> Answer:
    from suture.pipeline.pushing import push

    private, rest = _flag("--private", arguments)
    revision, rest = _option("--revision", rest)
    if unknown := next((word for word in rest if word.startswith("-")), None):
        raise ConfigError(unknown_name("option of suture push", unknown, ["--private", "--revision"]))
    if len(rest) != 2:
        raise ConfigError("Wanted: suture push RUN org/name [--private] [--revision BRANCH].")
    address = push(*rest, private=private, revision=revision)
    print(f"The model is at {address}")
    return Answer({"address": address}, address)


def _reproduce(arguments: list[str]) -> Answer:
    from suture.cli.tables import print_compared, print_published
    from suture.pipeline.reproduce import compare, published

    run, rest = _option("--check", arguments)
    listed, rest = _flag("--list", rest)
    _no_more(rest)
    if run is None and not listed:
        raise ConfigError("Wanted: suture reproduce --list, or suture reproduce --check RUN.")
    answer = Answer(None)
    if listed:
        print_published(published())
        lines = [f"{one.id}\t{one.command}" for one in published()]
        answer = Answer([asdict(one) | {"command": one.command} for one in published()], "\n".join(lines))
    if run is not None:
        found = compare(run)
        if not found:
            raise ConfigError(
                f"'{run}' is no run of a published figure. Remedy: suture reproduce --list has the commands."
            )
        print_compared(found)
        lines = [f"{one.published.id}\t{one.found:.2f}\t{'within' if one.within else 'outside'}" for one in found]
        data = [asdict(one) | {"within": one.within} for one in found]
        answer = Answer(data, "\n".join(lines), 0 if all(one.within for one in found) else 1)
    return answer


def _methods(arguments: list[str]) -> Answer:
    from suture.cli.tables import print_methods
    from suture.pipeline.methods import all_methods

    _no_more(arguments)
    print_methods()
    told = lambda method: {
        **{"name": method.name, "aliases": method.aliases, "paper": method.paper},
        **{"summary": method.knobs.summary, "knobs": method.knobs.defaults},
    }
    return Answer([told(method) for method in all_methods().values()], "\n".join(all_methods()))


def _zoo(arguments: list[str]) -> Answer:
    from suture import zoo

    if not arguments:
        found: Mapping[str, str] = zoo.inventory()
        for name, line in found.items():
            print(f"{name}  {line}")
        return Answer(found, "\n".join(found))
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
    return Answer({"name": rest[0], "folder": str(built)}, str(built))


def _demo(arguments: list[str]) -> Answer:
    from suture.pipeline import pipeline

    output, rest = _option("--output", arguments)
    _no_more(rest)
    folder = pipeline.demo(Path(output) if output else None)
    return Answer(_told(folder), str(folder))


def _completion(arguments: list[str]) -> Answer | None:
    from suture.cli.completion import HELP, SHELLS, script

    if len(arguments) != 1 or arguments[0] in ("--help", "-h"):
        return print(HELP)
    if arguments[0] not in SHELLS:
        raise ConfigError(unknown_name("shell", arguments[0], SHELLS))
    print(script(arguments[0]), end="")
    return None


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


#: The verbs and what runs them.
VERBS: dict[str, Callable[[list[str]], Answer | None]] = {
    "check": _check,
    "evaluate": _evaluate,
    "merge": _merge,
    "analyse": _analyse,
    "push": _push,
    "report": _report,
    "methods": _methods,
    "reproduce": _reproduce,
    "zoo": _zoo,
    "demo": _demo,
    "completion": _completion,
}
#: Words whose answer is text and nothing else.
_TEXT = ("--help", "-h", "--cfg", "-c", "--info", "-i", "--hydra-help", "--shell-completion", "-sc", "completion")


if __name__ == "__main__":
    sys.exit(main())
