"""Configuration: from command-line arguments or keywords to one plain dict per run, through Hydra.

Methods are in Hydra's config store, with the defaults of their signatures; pools are the YAML files of conf/, or the
user's own. Errors of Hydra and OmegaConf become a `ConfigError` of one line, with the nearest names. `surgery=…` is
accepted for the group `repair`.
"""

import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

from suture.errors import ConfigError, OutputError, one_line, unknown_name
from suture.pipeline.config_store import as_typed, store_all, store_pool, store_repair, typed_name, with_own_knobs
from suture.pipeline.methods import all_methods
from suture.pipeline.pool_files import read_pool
from suture.pipeline.repairs import JOIN

_MULTIRUN = {"-m", "--multirun"}
_GROUPS = ("modelpool", "taskpool")


def run_each(
    argv: Sequence[str], task: Callable[[dict[str, Any]], Any], check: Callable[[dict[str, Any]], Any]
) -> list[Any]:
    """Call `task` with the resolved configuration of every run on the command line; returns the results.

    `argv` is handed to Hydra as it is, with `--multirun` and any sweeper and launcher: the command line refuses first
    what could load code (`suture.cli.overrides`). The configurations of a sweep all go through `check` before the first
    run.
    """
    import hydra

    store_all()
    if _MULTIRUN & set(argv):
        for arguments in _combinations(_rewritten(argv)):
            check(compose(arguments))
    results: list[Any] = []
    failures: list[Exception] = []

    def job(config):
        try:
            result = task(_plain(config))
            if not _in_this_process():  # a launcher sends it back
                return result
            results.append(result)
        except Exception as error:
            if not _in_this_process():
                raise
            failures.append(error)  # raised below, because Hydra would print a line before it

    entry = hydra.main(version_base="1.3", config_path="pkg://suture.pipeline.conf", config_name="config")(job)
    returned: list[Any] = []
    with _one_line_errors(), _hydra_environment(argv), _lost_jobs(), _keeping_returns(returned):
        entry()
        results += [each.return_value for each in returned if each.return_value is not None]
    if failures:
        raise failures[0]
    return results


@contextmanager
def _keeping_returns(returned: list[Any]) -> Iterator[None]:
    """Inside the block, keep what the jobs of a sweep return, which `hydra.main` drops."""
    from hydra._internal.hydra import Hydra

    original = Hydra.multirun

    def multirun(self, *arguments, **more):
        batches = original(self, *arguments, **more)
        returned.extend(
            each for batch in batches or () for each in (batch if isinstance(batch, list | tuple) else [batch])
        )
        return batches

    Hydra.multirun = multirun
    try:
        yield
    finally:
        Hydra.multirun = original


@contextmanager
def _lost_jobs() -> Iterator[None]:
    """One line for a job that a launcher has lost, such as one whose process was killed."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("submitit", "ray"):
            raise
        remedy = "give the same command with hydra.sweep.dir=, the folder of this sweep: what is finished is kept"
        raise OutputError(f"A job of the sweep was lost ({type(error).__name__}). Remedy: {remedy}.") from error


def _combinations(arguments: Sequence[str]) -> Iterator[list[str]]:
    """The arguments of every run of a grid; other sweeps are left to their sweepers."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    choices: list[list[str]] = []
    with _one_line_errors():
        for override in OverridesParser.create().parse_overrides([a for a in arguments if a not in _MULTIRUN]):
            key = override.get_key_element()
            if key.startswith("hydra"):
                continue
            swept = override.is_discrete_sweep()
            values = override.sweep_string_iterator() if swept else [override.get_value_element_as_str()]
            choices.append([f"{key}={value}" if not override.is_delete() else f"{key}" for value in values])
    return map(list, product(*choices))


def _for_sweeping(arguments: Sequence[str]) -> list[str]:
    """Arguments in which single keys of a swept group are sweeps too: Hydra first composes without any sweeps."""
    if not _MULTIRUN & set(arguments):
        return list(arguments)
    swept = {key for key, _, value in (argument.partition("=") for argument in arguments) if "," in value}

    def as_sweep(argument: str) -> str:
        key, _, value = argument.partition("=")
        fixed = "." in key and key.split(".")[0] in swept and "," not in value
        return f"{key}=choice({value})" if fixed else argument

    return list(map(as_sweep, arguments))


def compose(argv: Sequence[str]) -> dict[str, Any]:
    """The resolved configuration of one run, without running it."""
    import hydra
    from omegaconf import OmegaConf

    store_all()
    with _one_line_errors(), hydra.initialize_config_module("suture.pipeline.conf", version_base="1.3"):
        config = hydra.compose("config", overrides=_rewritten(argv), return_hydra_config=True)
        choices = config.hydra.runtime.choices
        return _plain(OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]), argv, choices)


def composed(
    config: Mapping[str, Any] | Sequence[str] | None, keywords: Mapping[str, Any], *, method: str | None = None
) -> dict[str, Any]:
    """The configuration from a composed one, from command-line arguments, or from the keywords of a Python call.

    `method` is the default for a verb that does not merge.
    """
    if isinstance(config, Mapping):
        return dict(config)
    given = [argument for key, value in keywords.items() for argument in _arguments(key, value)]
    arguments = [*(config or ()), *given]
    if method is not None and not any(argument.startswith("method=") for argument in arguments):
        arguments.insert(0, f"method={method}")
    return compose(arguments)


def _arguments(key: str, value: Any) -> list[str]:
    """A keyword as command-line arguments."""
    if key in _GROUPS and isinstance(value, Mapping):
        return [f"{key}={store_pool(key, 'pool', value, f'<{key}>')}"]
    if key in ("method", "repair") and isinstance(value, Mapping):
        name = "name" if key == "method" else "kind"
        inside = [(f"{key}.{knob}", setting) for knob, setting in value.items() if knob != name]
        return [f"{key}={value[name]}", *(f"{knob}={_text(setting)}" for knob, setting in inside)]
    return [f"{key}={value}" if key in ("method", "repair", *_GROUPS) else f"{key}={_text(value)}"]


def with_knobs(command: str, knobs: Mapping[str, Any]) -> str:
    """A command with some knobs of the method set."""
    return shlex.join([*shlex.split(command), *(f"method.{knob}={_text(value)}" for knob, value in knobs.items())])


def _text(value: Any) -> str:
    """A value in Hydra's grammar."""
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{_text(each)}' for key, each in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_text, value))}]"
    text = str(value)
    return text if re.fullmatch(r"[\w./:-]+", text) else "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def compose_merging(argv: Sequence[str]) -> dict[str, Any]:
    """The configuration of `suture merge`. The paths base=, output=, mergekit= and models.NAME= are taken literally."""
    import hydra

    store_all()
    paths, others = {}, []
    for argument in argv:
        key, equals, value = argument.partition("=")
        if equals and (key in ("base", "output", "mergekit") or key.startswith("models.")):
            paths[key] = value
        else:
            others.append(argument)
    with _one_line_errors(), hydra.initialize_config_module("suture.pipeline.conf", version_base="1.3"):
        config = _plain(hydra.compose("merging", overrides=others))
    models = {key.removeprefix("models."): value for key, value in paths.items() if key.startswith("models.")}
    config["command"] = shlex.join(["suture", "merge", *argv])
    return config | {key: paths.get(key) for key in ("base", "output", "mergekit")} | {"models": models}


def pools(group: str) -> list[str]:
    """The names, with their folders, of the pools that ship with suture in a group: `modelpool` or `taskpool`."""
    root = files("suture.pipeline") / "conf" / group
    with_folder = sorted(str(path.relative_to(str(root)).with_suffix("")) for path in Path(str(root)).rglob("*.yaml"))
    return [name.replace(os.sep, "/") for name in with_folder]


def save(config: dict[str, Any], path: Path) -> None:
    """Write a configuration as YAML."""
    from omegaconf import OmegaConf

    OmegaConf.save(OmegaConf.create(config), path)


def _plain(config, arguments: Sequence[str] = (), choices: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A resolved configuration, with the choice of each group and the command; in a run of Hydra's both are Hydra's."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    if choices is None and HydraConfig.initialized():
        hydra_config = HydraConfig.get()
        choices = hydra_config.runtime.choices
        arguments = list(hydra_config.overrides.task)
        if _is_multirun() and plain["output"] is None:
            plain |= {"output": hydra_config.runtime.output_dir, "overwrite": True, "reuse": True}
    if choices is not None:
        own = {group: name for group, name in choices.items() if not group.startswith("hydra/")}
        plain["choices"] = {group: typed_name(name) for group, name in own.items()}
    return plain | {"command": shlex.join(["suture", *(word for each in arguments for word in as_typed(each))])}


def _is_multirun() -> bool:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def _in_this_process() -> bool:
    """Whether Hydra runs the task in this process, not through a launcher that starts others."""
    from hydra.core.hydra_config import HydraConfig

    return not _is_multirun() or HydraConfig.get().runtime.choices["hydra/launcher"] == "basic"


def _rewritten(argv: Sequence[str]) -> list[str]:
    """The arguments as Hydra takes them, without `taskpool=null`, which is its default."""
    named = [re.sub(r"^([+~]*)surgery(?=[.=]|$)", r"\1repair", argument) for argument in argv]
    return [_rewrite(argument) for argument in with_own_knobs(named) if argument != "taskpool=null"]


def _rewrite(argument: str) -> str:
    """Resolve a pool's name, with or without its folder, or the path of its YAML file."""
    group, equals, value = argument.partition("=")
    if group == "repair" and JOIN in value:
        for chain in value.split(","):
            store_repair(chain)
    if group not in _GROUPS or not equals or not value or value == "null":
        return argument
    return f"{group}={','.join(_pool(group, name) for name in value.split(','))}"


def _pool(group: str, name: str) -> str:
    known = pools(group)
    if name in known:
        return name
    if name.endswith((".yaml", ".yml")):
        return _own_pool(group, Path(name))
    matches = [candidate for candidate in known if candidate.split("/")[-1] == name]
    return matches[0] if matches else name


def _own_pool(group: str, path: Path) -> str:
    """Put the pool of a YAML file into Hydra's store; returns its name there."""
    return store_pool(group, path.stem, read_pool(group, path), str(path))


@contextmanager
def _hydra_environment(argv: Sequence[str]) -> Iterator[None]:
    """Inside the block, the process state that Hydra reads: its arguments, and the flag to raise errors."""
    before, sys.argv = sys.argv, ["suture", *_for_sweeping(_rewritten(argv))]
    full_error = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = before
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]


@contextmanager
def _one_line_errors() -> Iterator[None]:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error)) from None
    except ValueError as error:  # hydra's own: a group that is given a number
        if not str(error).startswith("Config group override"):
            raise
        raise ConfigError(f"{one_line(error)} Remedy: give the name of one.") from None
    except RecursionError:
        raise ConfigError("The configuration is nested too deeply. Remedy: give values that are not nested.") from None


def _explain(error: BaseException) -> str:
    from hydra.errors import MissingConfigException

    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, name = str(error.missing_cfg_file).partition("/")
        own = " A file of your own is named with its ending, .yaml." if group in _GROUPS else ""
        return unknown_name(group, name, _all_names(group, error.options)) + own
    for group in ("method", *_GROUPS):
        if f"You must specify '{group}'" in str(error):
            return f"Missing argument: {group}=…. Known: {', '.join(_all_names(group, list(all_methods())))}."
    for cause in (error, error.__cause__):
        key, parent = getattr(cause, "key", None), getattr(cause, "parent_node", None)
        if key is not None and parent is not None and hasattr(parent, "keys"):
            full, known = getattr(cause, "full_key", None) or str(key), _full_keys(parent)
            if known == ["repair.kind"]:
                return f"{full} is given, but no repair. Remedy: name one, such as repair=final."
            return unknown_name("key", full, known)
    return " ".join(str(error).split())


def _full_keys(parent) -> list[str]:
    prefix = parent._get_full_key(None) if parent._get_parent() is not None else ""
    return [f"{prefix}.{key}" if prefix else str(key) for key in parent if key != "hydra"]


def _all_names(group: str, options: Sequence[str]) -> list[str]:
    return pools(group) if group in _GROUPS else list(options)
