"""The action of each verb: one call of a public function of suture, whose result is printed."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import which
from typing import Any

from suture.cli.catalogue import MethodEntry, catalogue
from suture.cli.grammar import Request, shipped_pools
from suture.cli.output import Answer
from suture.errors import ConfigError, unknown_name
from suture.storage.atomic import check_replaceable


@dataclass(frozen=True)
class _Done:
    """The part of a run that a sweep keeps: models are left to their folders."""

    data: dict[str, Any]
    folder: Path | None


def run(request: Request) -> Answer:
    """Merge, score, repair and report; with several values of a key, all of their combinations."""
    from suture.cli import tables
    from suture.cli.overrides import check_overrides
    from suture.pipeline import config, pipeline
    from suture.pipeline.settings import Settings
    from suture.reporting.sweep import summarise

    def run_one(configuration: Mapping[str, Any]) -> _Done:
        result = pipeline.run(configuration)
        tables.print_run(result)
        return _Done(_as_data(result), getattr(result, "folder", None))

    check_overrides(request.words, request.verb.configuration)
    if request.values.get("--plan"):
        if request.values.get("--multirun"):
            raise ConfigError("--plan with -m: wanted one run. Remedy: plan one of them, which stands for the others.")
        return _planned(config.compose(request.words))
    done = config.run_each([*_for_hydra(request), *request.words], run_one, Settings.from_config)
    folders = [each.folder for each in done if each.folder is not None]
    for summary in summarise(folders) if len(folders) > 1 else ():
        tables.print_sweep(summary.report, summary.folder)
    data = [each.data for each in done]
    code = 2 if any(each.get("problems") for each in data) else 0
    return Answer(data[0] if len(data) == 1 else {"runs": data}, "\n".join(map(str, folders)), code)


def _for_hydra(request: Request) -> list[str]:
    given = {name: value for name, value in request.values.items() if value and name != "--plan"}
    return [word for name, value in given.items() for word in ((name,) if value is True else (name, value))]


def _planned(config: Any, **options: Any) -> Answer:
    """The plan of a job, printed in place of it."""
    from suture.pipeline.planning import plan

    planned = plan(config, **options)
    print(planned)
    memory = {"memory": planned.memory, "device_memory": planned.device_memory}
    data = {"stages": [asdict(stage) for stage in planned.stages], "seconds": planned.seconds, **memory}
    on = {str(devices): planned.on(devices) for devices in (2, 4, 8)}
    return Answer(data | {"devices": on, "left_out": list(planned.left_out)}, f"{planned.seconds:.0f}")


def _as_data(result: Any) -> dict[str, Any]:
    """A run's folder and report, or what a dry run found."""
    if not hasattr(result, "folder"):
        return asdict(result)
    return {"folder": str(result.folder), **json.loads((result.folder / "report.json").read_text("utf-8"))}


def check(request: Request) -> Answer:
    """Everything that can be known before a run."""
    from suture.cli import tables
    from suture.pipeline.preflight import check

    files = any(word.startswith(("base=", "models.")) for word in request.words)
    preflight = check(**_named_files(request.words)) if files else check(_composed(request))
    tables.print_preflight(preflight)
    return Answer(asdict(preflight), "\n".join(preflight.problems), 2 if preflight.problems else 0)


def _named_files(words: Sequence[str]) -> dict[str, Any]:
    """The words of a check of files as keywords."""
    keywords: dict[str, Any] = {"models": {}}
    for word in words:
        key, _, value = word.partition("=")
        if key.startswith("models."):
            keywords["models"][key.removeprefix("models.")] = value
        elif key == "models":
            raise ConfigError(f"{word}: a model needs a name. Remedy: models.NAME={value}")
        else:
            keywords[key] = value
    return keywords


def _composed(request: Request) -> dict[str, Any]:
    """The configuration of a verb for which a method need not be named."""
    from suture.cli.overrides import check_overrides
    from suture.pipeline import config

    check_overrides(request.words, request.verb.configuration)
    named = any(word.startswith("method=") for word in request.words)
    return config.compose([*([] if named else [f"method={request.verb.method}"]), *request.words])


def evaluate(request: Request) -> Answer:
    """Scores of a pool's models, without a merge."""
    from suture.cli import tables
    from suture.pipeline.pipeline import evaluate_pool

    matrix = request.values.get("matrix", "false")
    if matrix not in ("true", "false"):
        raise ConfigError(f"matrix={matrix}: wanted true or false.")
    composed = _composed(request)
    if request.values.get("--plan"):
        return _planned(composed, verb="evaluate", model=request.values.get("model"), matrix=matrix == "true")
    report = evaluate_pool(composed, model=request.values.get("model"), matrix=matrix == "true")
    tables.print_report(report)
    data = report.as_data()
    data = {key: data[key] for key in ("tasks", "samples", "rows", "matrix")} | {"folder": composed["output"]}
    return Answer(data, "\n".join(f"{row.name}\t{100 * row.mean:.2f}" for row in report.rows))


_SEARCH_NUMBERS = ("trials", "num_inputs", "groups")


def search(request: Request) -> Answer:
    """A search for knobs, then the run with the best."""
    from suture.cli import tables
    from suture.cli.overrides import check_overrides
    from suture.pipeline.searching import search

    searched = dict(word.split("=", 1) for word in request.words if _has_several(word))
    words = [word for word in request.words if word.partition("=")[0] not in searched]
    check_overrides(words, request.verb.configuration)
    numbers = {key: _whole(key, request.values[key]) for key in _SEARCH_NUMBERS if key in request.values}
    names = {key: request.values[key] for key in ("sampler", "score", "split") if key in request.values}
    if request.values.get("--plan"):
        return _planned(words, verb="search", over=searched, searching={**numbers, **names})
    result = search(words, over=searched, **numbers, **names)
    tables.print_run(result)
    tables.print_best(result)
    trials = [asdict(trial) for trial in result.trials]
    return Answer(_as_data(result) | {"trials": trials}, str(result.folder))


def _has_several(word: str) -> bool:
    """Whether a word gives a knob of the method several values or an interval."""
    key, _, value = word.partition("=")
    return key.startswith("method.") and value[:1] not in "[{'\"" and ("," in value or ".." in value)


def _whole(key: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise ConfigError(f"{key}={value}: wanted a whole number.") from None


def merge(request: Request) -> Answer:
    """A merge of checkpoint files, or its plan."""
    from suture.cli.overrides import check_overrides
    from suture.file_merge import launch_shares, merge_configured
    from suture.pipeline import config

    check_overrides([word for word in request.words if not _is_path(word)], request.verb.configuration)
    configured = config.compose_merging(request.words)
    if launcher := request.values.get("--launcher"):
        shards = _whole("--shards", request.values.get("--shards") or "2")
        launch_shares(request.words, shards=shards, launcher=launcher)
    elif request.values.get("--shards"):
        raise ConfigError("--shards without --launcher. Remedy: --launcher local, or --shard i/n for one share.")
    result = merge_configured(configured)
    print(*(f"note: {note}" for note in result.notes), result, sep="\n")
    if result.plan is None:
        return Answer({"output": str(result.output), "finished": result.finished}, str(result.output))
    return Answer(asdict(result.plan) | {"seconds": result.plan.seconds}, str(result.plan))


def transplant(request: Request) -> Answer:
    """A model with the tokenizer of another."""
    from suture.file_merge import transplant

    values = request.values
    if not values["--output"]:
        raise ConfigError("Missing option: --output FOLDER, a new folder for the model.")
    options: dict[str, Any] = {"overwrite": bool(values["--overwrite"])}
    if values["--atoms"]:
        options["atoms"] = _whole("--atoms", values["--atoms"])
    if values["--memory"]:
        options["memory"] = values["--memory"]
    folder = transplant(values["MODEL"], values["DONOR"], values["--output"], **options)
    found = json.loads((folder / "suture_merge.json").read_text("utf-8"))["transplant"]
    rest = "row is a sum" if found["other_rows"] == 1 else "rows are sums"
    print(
        f"{found['shared_tokens']} tokens keep their rows; {found['other_rows']} {rest} of at most {found['atoms']} "
        f"of these.\nThe model is in {folder}"
    )
    return Answer({"output": str(folder), **found}, str(folder))


def _is_path(word: str) -> bool:
    key = word.partition("=")[0]
    return key in ("base", "output", "mergekit") or key.startswith("models.")


def analyse(request: Request) -> Answer:
    """One analysis: its table, and files with the figure."""
    from suture.cli import tables
    from suture.pipeline.analyses import analyse

    options = {key.name: request.values[key.name] for key in request.verb.own_keys if key.name in request.values}
    options |= {key: options[key].split(",") for key in ("models", "points") if key in options}
    finding, folder = analyse(request.values["ANALYSIS"], _composed(request), options=options)
    tables.print_finding(finding)
    print(f"The table and the figure are in {folder}")
    return Answer(finding.as_data() | {"folder": str(folder)}, str(folder))


def report(request: Request) -> Answer:
    """The page of one run, or of several side by side."""
    from suture.reporting import report

    values = request.values
    page = report(values["RUN"], values["--output"], interactive=not values["--still"])
    print(f"The page is {page}")
    return Answer({"page": str(page)}, str(page))


def push(request: Request) -> Answer:
    """A finished run on the hub."""
    from suture.pipeline.pushing import push

    values = request.values
    address = push(values["RUN"], values["NAME"], private=bool(values["--private"]), revision=values["--revision"])
    print(f"The model is at {address}")
    return Answer({"address": address}, address)


def reproduce(request: Request) -> Answer:
    """The published figures, or a run beside them."""
    from suture.cli import tables
    from suture.pipeline.reproduce import compare, published

    if run := request.values["--check"]:
        compared = compare(run)
        if not compared:
            raise ConfigError(f"'{run}' is no run of a published figure. Remedy: suture reproduce lists the commands.")
        tables.print_compared(compared)
        lines = [f"{one.published.id}\t{one.found:.2f}\t{'within' if one.within else 'outside'}" for one in compared]
        data = [asdict(one) | {"within": one.within} for one in compared]
        return Answer(data, "\n".join(lines), 0 if all(one.within for one in compared) else 1)
    tables.print_published(published())
    lines = [f"{figure.id}\t{figure.command}" for figure in published()]
    return Answer([asdict(figure) | {"command": figure.command} for figure in published()], "\n".join(lines))


def methods(request: Request) -> Answer:
    """Every method and repair in a line each or with its knobs, or one with what its knobs may be."""
    from suture.cli import method_tables

    known, all_knobs = catalogue(), bool(request.values["--all"])
    if name := request.values["METHOD"]:
        if all_knobs:
            raise ConfigError(f"--all with {name}: wanted one of them. Remedy: leave one out.")
        method = known.method(name)
        method_tables.print_method(method)
        ranges = {name: knob.range for name, knob in method.knobs.items()}
        return Answer(_method_data(method) | {"ranges": ranges}, method.name)
    show = method_tables.print_methods if all_knobs else method_tables.print_lines
    show([*known.methods.values(), *known.repairs.values()])
    return Answer(list(map(_method_data, known.methods.values())), "\n".join(known.methods))


def _method_data(method: MethodEntry) -> dict[str, Any]:
    data = {"name": method.name, "aliases": method.aliases, "paper": method.paper, "summary": method.summary}
    return data | {"inputs": method.inputs, "knobs": {name: knob.default for name, knob in method.knobs.items()}}


def init(request: Request) -> Answer:
    """The YAML files of pools for a start."""
    from suture.pipeline.starting import init

    values = request.values
    output = values["--output"] or "."
    started = init(values["FOLDER"], output, base=values["--base"], family=values["--family"])
    pools = f"modelpool={started.modelpool}" + (f" taskpool={started.taskpool}" if started.taskpool else "")
    print(*started.lines, f"Next: suture check {pools}", sep="\n")
    files = [str(path) for path in (started.modelpool, started.taskpool) if path]
    return Answer({"files": files, "notes": started.lines}, "\n".join(files))


def pools(request: Request) -> Answer:
    """The pools that ship."""
    names = {group: shipped_pools(group) for group in ("modelpool", "taskpool")}
    for group, shipped in names.items():
        print("\n".join(f"{group}={name}" for name in shipped))
    return Answer(names, "\n".join(name for shipped in names.values() for name in shipped))


def zoo(request: Request) -> Answer:
    """The zoos by name, all or some."""
    from suture.zoo import inventory

    zoos, named = inventory(), request.values["NAME"]
    if named[:1] == ["build"]:
        build = "python -m tools.zoo build NAME in a checkout of suture's repository"
        raise ConfigError(f"suture zoo only lists the zoos. Remedy: {build}.")
    for name in named:
        if name not in zoos:
            raise ConfigError(unknown_name("zoo", name, zoos))
    lines = {name: zoos[name] for name in named or zoos}
    for name, line in lines.items():
        print(f"{name}  {line}")
    return Answer(lines, "\n".join(lines))


def demo(request: Request) -> Answer:
    """The demonstration; each row is printed when it is known."""
    from suture.cli import tables

    full, output, overwrite = (request.values[name] for name in ("--full", "--output", "--overwrite"))
    if output is not None:
        check_replaceable(Path(output), bool(overwrite))
    print(_STORY.format(_FULL_STORY if full else "", "4 to 6 minutes" if full else "about a minute"), flush=True)
    from suture.pipeline.demo import demo

    result = demo(output, full=bool(full), overwrite=bool(overwrite), watch=tables.print_row)
    print()
    tables.print_run(result)
    own = _typed()
    following = f"Next: {own} methods ties_merging; {own} method=ties_merging modelpool=glyphs8 taskpool=glyphs8"
    print(f"The page is {result.folder / 'report.html'}", _STATES, following, sep="\n")
    return Answer(_as_data(result), str(result.folder))


_STORY = """glyphs8: a small CLIP and eight experts fine-tuned from it, each for one alphabet or set of signs.
They are merged into one model, without labels: by weight average, Task Arithmetic, TIES and ASWUDI. TIES is then
repaired with modules for each task (final), ASWUDI in its own weights (calibrate).{} On two cores: {}.
Mean accuracy on the eight tasks, as each model is ready:
"""
_FULL_STORY = " AdaMerging learns its coefficients, and is repaired twice."
_STATES = "outputs/resume keeps the states of loops, so that no work is done twice; you may remove it."


def _typed() -> str:
    """This command as it can be typed here: by its path where a shell would not find it, or finds another one."""
    own = Path(sys.executable).parent / "suture"
    found = which("suture")
    return "suture" if not own.exists() or (found and Path(found).samefile(own)) else os.path.relpath(own)


def completion(request: Request) -> None:
    """A script for a shell, or how to install it."""
    from suture.cli.completion import script

    shell = request.values["SHELL"]
    if shell is None:
        return explain(request)
    print(script(shell, request.verbs), end="")


def explain(request: Request) -> None:
    """The help: all verbs, or the one of the request."""
    from suture.cli.help import overview, page

    named = request.values.get("VERB")
    verb = request.verbs[named] if named else request.verb
    print(overview(request.verbs) if verb.name == "help" else page(verb))


def version() -> Answer:
    """The version of suture."""
    from suture import __version__

    print(f"suture {__version__}")
    return Answer({"version": __version__}, __version__)
