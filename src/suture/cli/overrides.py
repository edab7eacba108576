"""A guard before Hydra: no word of the command line names code, a pickle, or a configuration from elsewhere.

Hydra instantiates whatever class a `_target_` of its launcher, sweeper, callbacks or loggers names, and unpickles what
`--experimental-rerun` names. So only installed plugins can be chosen, by name, and only settings of theirs and the
folders of a sweep can be given. Of Hydra's options the table of verbs has the four that are of use: `--multirun`,
`--cfg`, `--resolve`, `--package`.
"""

import re
from collections.abc import Sequence

from suture.cli.grammar import configuration_keys
from suture.errors import ConfigError, shown

_TARGET = re.compile(r"(?<!\w)_target_(?!\w)")
_PLUGIN = re.compile(r"hydra/(launcher|sweeper)")
_LONGEST_NAME = 250  # letters of a file's name
_SETTING = re.compile(r"hydra\.(sweep\.(dir|subdir)|(launcher|sweeper)(\.\w+)+)")
_REMEDY = "Remedy: leave it out. Of Hydra, suture takes hydra/launcher, hydra/sweeper, their keys and hydra.sweep"


def check_overrides(words: Sequence[str], configuration: str) -> None:
    """Refuse, in one line, words that would have Hydra run or load what is not an installed plugin."""
    groups = {"surgery", *(key.name for key in configuration_keys(configuration) if key.group)}
    for word in words:
        typed, _, value = word.partition("=")
        key = typed.lstrip("+~")
        if _TARGET.search(word):
            raise ConfigError(f"{typed}: a _target_ names code to run, and suture runs none. {_REMEDY}.")
        if "@" in key:
            raise ConfigError(f"{typed}: a group cannot be put elsewhere with @. Remedy: name the group alone.")
        if key.startswith("hydra"):
            _check_hydra(typed, key, value)
        elif "/" in key:
            group = key.partition("/")[0]
            raise ConfigError(f"{typed} is no key. Remedy: {group}=NAME for a configuration, {group}.KEY for its keys.")
        elif key in groups:
            _check_choice(key, value)


def _check_hydra(typed: str, key: str, value: str) -> None:
    if _PLUGIN.fullmatch(key):
        if not re.fullmatch(r"\w+", value):
            raise ConfigError(f"{typed}={value}: wanted the name of an installed plugin.")
    elif not _SETTING.fullmatch(key):
        raise ConfigError(f"{typed} cannot be set. {_REMEDY}.")
    elif not key.startswith("hydra.sweep.") and re.search(r"[${]", value):
        raise ConfigError(f"{typed}={value}: wanted a plain value, or a list of them.")


def _check_choice(group: str, value: str) -> None:
    """A group is chosen by one name, or in a sweep by several: not by a folder, a list or something computed."""
    outside = any(".." in name and not name.endswith((".yaml", ".yml")) for name in value.split(","))
    if value in ("", "null") and group != "taskpool":
        raise ConfigError(f"{group}={value}: wanted a name.")
    if re.fullmatch(r"[-+\d.,]+|true|false", value):
        raise ConfigError(f"{group}={value}: wanted a name, not a number.")
    if any(len(part) > _LONGEST_NAME for name in value.split(",") for part in name.split("/")):
        raise ConfigError(f"{group}={shown(value)}: no name is that long.")
    if outside or re.search(r"[\[\]{}$]", value):
        raise ConfigError(f"{group}={value}: wanted a name, or in a sweep names with commas between them.")
