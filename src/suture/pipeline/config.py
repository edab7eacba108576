"""From the words of a command line, or from keywords, to one plain dict per run. The only file that knows Hydra.

Methods are put into Hydra's config store with the defaults of their signatures; pools are the YAML files of conf/, or a
YAML file of the user's own. What Hydra or OmegaConf refuses comes out as a `ConfigError` of one line with the nearest
names. `surgery=…`, as it is often typed, is the group `repair`.
"""

import hashlib
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

from suture.errors import ConfigError, unknown_name
from suture.pipeline.methods import all_methods
from suture.pipeline.repairs import NONE, Repair
from suture.repairs import repair_kinds

_MULTIRUN = {"-m", "--multirun"}
_GROUPS = ("modelpool", "taskpool")
_TYPED: dict[str, str] = {}  # the name that hydra has for a pool of the user's own → the path that was typed


def run_each(
    argv: Sequence[str], task: Callable[[dict[str, Any]], Any], check: Callable[[dict[str, Any]], Any]
) -> list[Any]:
    """Call `task` with the resolved configuration of every run that the command line asks for; returns the results.

    `argv` is handed to hydra as it is, with `--multirun` and any sweeper and launcher: the command line refuses what
    could load code first (`suture.cli.overrides`). Of a sweep every configuration goes through `check` before the
    first is run.
    """
    import hydra

    _register()
    if _MULTIRUN & set(argv):
        for words in _combinations(_rewritten(argv)):
            check(compose(words))
    results: list[Any] = []
    failures: list[Exception] = []

    def job(config):
        try:
            results.append(task(_plain(config)))
        except Exception as error:
            if not _in_this_process():
                raise
            failures.append(error)  # hydra would print a line of its own before raising it

    entry = hydra.main(version_base="1.3", config_path="pkg://suture.pipeline.conf", config_name="config")(job)
    with _one_line_errors(), _hydra_environment(argv):
        entry()
    if failures:
        raise failures[0]
    return results


def _combinations(words: Sequence[str]) -> Iterator[list[str]]:
    """The words of every run of a grid; sweeps that another sweeper draws are left to it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    choices: list[list[str]] = []
    with _one_line_errors():
        for override in OverridesParser.create().parse_overrides([word for word in words if word not in _MULTIRUN]):
            key = override.get_key_element()
            if key.startswith("hydra"):
                continue
            swept = override.is_discrete_sweep()
            values = override.sweep_string_iterator() if swept else [override.get_value_element_as_str()]
            choices.append([f"{key}={value}" if not override.is_delete() else f"{key}" for value in values])
    return map(list, product(*choices))


def _for_sweeping(words: Sequence[str]) -> list[str]:
    """Keys of a group that is swept become sweeps of one value: hydra composes once without all sweeps first."""
    if not _MULTIRUN & set(words):
        return list(words)
    swept = {word.partition("=")[0] for word in words if "," in word.partition("=")[2]}
    fixed = lambda key, value: "." in key and key.split(".")[0] in swept and "," not in value
    parts = [(word, *word.partition("=")[::2]) for word in words]
    return [f"{key}=choice({value})" if fixed(key, value) else word for word, key, value in parts]


def compose(argv: Sequence[str]) -> dict[str, Any]:
    """The resolved configuration of one run, without running it."""
    import hydra

    _register()
    with _one_line_errors(), hydra.initialize_config_module("suture.pipeline.conf", version_base="1.3"):
        return _plain(hydra.compose("config", overrides=_rewritten(argv)), argv)


def composed(
    config: Mapping[str, Any] | Sequence[str] | None, keywords: Mapping[str, Any], *, method: str | None = None
) -> dict[str, Any]:
    """A configuration that is composed already, or words, or the keywords of a Python call.

    `method` is the one of a verb that merges nothing, where none is named.
    """
    if isinstance(config, Mapping):
        return dict(config)
    words = [*(config or ()), *(word for key, value in keywords.items() for word in _words(key, value))]
    if method is not None and not any(word.startswith("method=") for word in words):
        words.insert(0, f"method={method}")
    return compose(words)


def _words(key: str, value: Any) -> list[str]:
    """The words that a keyword stands for."""
    if key in _GROUPS and isinstance(value, Mapping):
        return [f"{key}={_stored_pool(key, 'pool', value, f'<{key}>')}"]
    if key in ("method", "repair") and isinstance(value, Mapping):
        name = "name" if key == "method" else "kind"
        inside = [(f"{key}.{knob}", setting) for knob, setting in value.items() if knob != name]
        return [f"{key}={value[name]}", *(f"{knob}={_text(setting)}" for knob, setting in inside)]
    return [f"{key}={value}" if key in ("method", "repair", *_GROUPS) else f"{key}={_text(value)}"]


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
    """What `suture merge` was told. Paths are taken as they stand: base=, output=, mergekit= and models.NAME=."""
    import hydra

    _register()
    paths, words = {}, []
    for word in argv:
        key, equals, value = word.partition("=")
        if equals and (key in ("base", "output", "mergekit") or key.startswith("models.")):
            paths[key] = value
        else:
            words.append(word)
    with _one_line_errors(), hydra.initialize_config_module("suture.pipeline.conf", version_base="1.3"):
        config = _plain(hydra.compose("merging", overrides=words))
    models = {key.removeprefix("models."): value for key, value in paths.items() if key.startswith("models.")}
    config["command"] = shlex.join(["suture", "merge", *argv])
    return config | {key: paths.get(key) for key in ("base", "output", "mergekit")} | {"models": models}


def pools(group: str) -> list[str]:
    """The pools that ship with suture: `modelpool` or `taskpool`, names with their folder."""
    root = files("suture.pipeline") / "conf" / group
    with_folder = sorted(str(path.relative_to(str(root)).with_suffix("")) for path in Path(str(root)).rglob("*.yaml"))
    return [name.replace(os.sep, "/") for name in with_folder]


def save(config: dict[str, Any], path: Path) -> None:
    """Write a configuration as YAML."""
    from omegaconf import OmegaConf

    OmegaConf.save(OmegaConf.create(config), path)


def _register() -> None:
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    for kind in (NONE, *repair_kinds()):
        store.store(group="repair", name=kind, node=_node(Repair.defaults(kind)), provider="suture")
    for method in all_methods().values():
        defaults = _node(method.knobs.defaults)
        for name in (method.name, *method.aliases):
            told = name if "name" in defaults else method.name
            folder, _, last = f"method/{name}".rpartition("/")
            store.store(group=folder, name=last, node=defaults | {"name": told}, provider="suture")


def _node(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Knobs as a configuration holds them; a seed of their own is the run's, unless it is given."""
    plain = {knob: list(value) if isinstance(value, tuple) else value for knob, value in defaults.items()}
    return plain | ({"seed": "${seed}"} if "seed" in plain else {})


def _plain(config, words: Sequence[str] = ()) -> dict[str, Any]:
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    if HydraConfig.initialized():
        hydra_config = HydraConfig.get()
        choices = {
            group: name for group, name in hydra_config.runtime.choices.items() if not group.startswith("hydra/")
        }
        plain["choices"] = {group: _TYPED.get(name, name) for group, name in choices.items()}
        words = list(hydra_config.overrides.task)
        if _is_multirun() and plain["output"] is None:
            plain |= {"output": hydra_config.runtime.output_dir, "overwrite": True, "reuse": True}
    return plain | {"command": shlex.join(["suture", *map(_as_typed, words)])}


def _as_typed(word: str) -> str:
    key, equals, value = word.partition("=")
    return f"{key}{equals}{_TYPED.get(value, value)}"


def _is_multirun() -> bool:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def _in_this_process() -> bool:
    """Whether hydra calls the task itself, and no launcher that hands it to other processes."""
    from hydra.core.hydra_config import HydraConfig

    return not _is_multirun() or HydraConfig.get().runtime.choices["hydra/launcher"] == "basic"


def _rewritten(argv: Sequence[str]) -> list[str]:
    """The words as hydra takes them; no tasks at all is its default."""
    return [_rewrite(argument) for argument in argv if argument != "taskpool=null"]


def _rewrite(argument: str) -> str:
    """Pools go by their name with or without their folder, or by the path of a YAML file."""
    argument = re.sub(r"^([+~]*)surgery(?=[.=]|$)", r"\1repair", argument)
    group, equals, value = argument.partition("=")
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
    """Put the pool of a YAML file into Hydra's store; returns the name that it has there."""
    return _stored_pool(group, path.stem, _read_pool(group, path), str(path))


def _stored_pool(group: str, stem: str, node: Any, typed: str) -> str:
    """The name in Hydra's store of a pool that is not one of ours."""
    from hydra.core.config_store import ConfigStore

    name = f"{stem}_{hashlib.sha256(json.dumps([typed, node], default=str).encode()).hexdigest()[:8]}"
    ConfigStore.instance().store(group=group, name=name, node=node, provider="suture")
    _TYPED[name] = typed
    return name


def _read_pool(group: str, path: Path) -> dict[Any, Any]:
    from omegaconf import OmegaConf
    from yaml import YAMLError

    try:
        pool = OmegaConf.load(path) if path.stat().st_size else None
    except YAMLError as error:
        raise ConfigError(f"{group}={path} is not valid YAML: {' '.join(str(error).split())}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{group}={path} is not text in UTF-8. Remedy: give a pool's YAML file.") from None
    except FileNotFoundError:
        raise ConfigError(f"{group}={path}: there is no such file. Remedy: give the path of a YAML file.") from None
    except OSError as error:
        problem = error.strerror or "it holds no pool"
        raise ConfigError(f"{group}={path}: {problem}. Remedy: give the path of a YAML file.") from None
    content = OmegaConf.to_container(pool) if pool is not None else None
    if not isinstance(content, dict):
        raise ConfigError(f"{group}={path} holds no pool. Remedy: give a YAML file with keys such as models or tasks.")
    if "defaults" in content:
        raise ConfigError(f"{group}={path} has a list of defaults. Remedy: write out what it refers to.")
    return content


@contextmanager
def _hydra_environment(argv: Sequence[str]) -> Iterator[None]:
    """What hydra reads from the process: the arguments, and that it should raise instead of printing."""
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


def _explain(error: BaseException) -> str:
    from hydra.errors import MissingConfigException

    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, name = str(error.missing_cfg_file).partition("/")
        return unknown_name(group, name, _all_names(group, error.options))
    for group in ("method", *_GROUPS):
        if f"You must specify '{group}'" in str(error):
            return f"Missing argument: {group}=…. Known: {', '.join(_all_names(group, list(all_methods())))}."
    for cause in (error, error.__cause__):
        key, parent = getattr(cause, "key", None), getattr(cause, "parent_node", None)
        if key is not None and parent is not None and hasattr(parent, "keys"):
            return unknown_name("key", getattr(cause, "full_key", None) or str(key), _full_keys(parent))
    return " ".join(str(error).split())


def _full_keys(parent) -> list[str]:
    prefix = parent._get_full_key(None) if parent._get_parent() is not None else ""
    return [f"{prefix}.{key}" if prefix else str(key) for key in parent if key != "hydra"]


def _all_names(group: str, options: Sequence[str]) -> list[str]:
    return pools(group) if group in _GROUPS else list(options)
