"""Pools: a pretrained model with its fine-tuned versions, and the tasks on which they are scored."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from suture.checkpoints import Source
from suture.errors import PRETRAINED, ConfigError, check_known
from suture.families import family
from suture.tasks import Task, known
from suture.tasks.class_names import plain

_TASK_ORDER = [key.name for key in fields(Task) if key.name != "name"]
_TASK_KEYS = {*_TASK_ORDER, "folders"}
_CHOICES = ("frozen", "keep", "only")


@dataclass(frozen=True)
class ModelPool:
    """The models of one merge; `mixed_dtypes` allows dtypes other than the base's.

    `frozen`, `keep` and `only` are canonical names or patterns of tensors, as in `suture.merge`, such as
    `model.language_model.*` and `*embed*`. `settings` are the family's own keys. In a pool's YAML, relative paths start
    from the folder `root`.
    """

    base: Source
    models: Mapping[str, Source]
    family: str = "clip"
    frozen: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    mixed_dtypes: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ModelPool":
        """Read a pool's YAML; raises `ConfigError` for a missing `_pretrained_`, no models, or an unknown key."""
        own = family(config.get("family", "clip")).known_settings
        check_known("key of modelpool", config, {"family", "models", *_CHOICES, "mixed_dtypes", "root", *own})
        config = {key: _under(config.get("root"), value) for key, value in config.items()}
        models = _mapping("modelpool.models", config.get("models"))
        if PRETRAINED not in models:
            raise ConfigError(
                f"modelpool.models has no '{PRETRAINED}' (found: {', '.join(models) or 'nothing'}). "
                "Remedy: name the pretrained model that all others were fine-tuned from."
            )
        base = models.pop(PRETRAINED)
        if not models:
            raise ConfigError(
                "modelpool.models names no fine-tuned model. Remedy: add at least one beside _pretrained_."
            )
        options = {key: config[key] for key in ("family", "mixed_dtypes") if key in config}
        settings = {key: config[key] for key in own if config.get(key) is not None}
        names = {key: _patterns(key, config.get(key)) for key in _CHOICES}
        return cls(base, models, settings=settings, **names, **options)


@dataclass(frozen=True)
class TaskPool:
    """The tasks of one evaluation, and the knobs that the pool recommends for each method, if any.

    In a pool's YAML, a task of the published benchmarks (`sun397`, `stanford-cars`, …) needs no keys. Tasks are looked
    for by name in the folder `root` before their own sources are used.
    """

    tasks: tuple[Task, ...]
    recommended: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "TaskPool":
        """Read a pool's YAML; raises `ConfigError` for a missing or an unknown key."""
        check_known("key of taskpool", config, {"tasks", "root", "recommended"})
        named = _mapping("taskpool.tasks", config.get("tasks"))
        if not named:
            raise ConfigError("taskpool.tasks is empty. Remedy: name at least one task.")
        root = config.get("root")
        tasks = tuple(_task(name, _mapping(f"taskpool.tasks.{name}", task), root) for name, task in named.items())
        return cls(tasks, config.get("recommended") or {})


def check_filled(modelpool: Mapping[str, Any], taskpool: Mapping[str, Any] | None) -> None:
    """Raise one `ConfigError` that names every key left open in two pools, if there are several.

    A single one is left to whoever reads its pool. Optional keys without a value count only beside needed ones.
    """
    open_keys = _open_settings(modelpool)
    for name, task in _mapping("taskpool.tasks", (taskpool or {}).get("tasks")).items():
        where = f"taskpool.tasks.{name}"
        open_keys += [f"{where}.{key}" for key in _open_keys(name, _mapping(where, task), (taskpool or {}).get("root"))]
    if len(open_keys) > 1:
        raise ConfigError(f"{len(open_keys)} keys have no value: {', '.join(open_keys)}. Remedy: fill them in.")


def _open_settings(modelpool: Mapping[str, Any]) -> list[str]:
    needed = family(modelpool.get("family", "clip")).needed_settings
    return [f"modelpool.{key}" for key in sorted(needed) if modelpool.get(key) is None]


def _open_keys(name: str, config: Mapping[str, Any], root: str | None) -> list[str]:
    """Keys of a task that have no value: those it needs, and where one of these lacks, any that stand there empty."""
    keys = _keys(name, config, root)
    needed = _missing(keys)
    return [key for key in _TASK_ORDER if key in needed or (needed and key in config and keys.get(key) is None)]


def _patterns(key: str, value: Any) -> tuple[str, ...]:
    """A list of names or patterns; one text is a list of one."""
    values = [value] if isinstance(value, str) else value or ()
    if not isinstance(values, list | tuple) or not all(isinstance(each, str) for each in values):
        raise ConfigError(f"modelpool.{key}={value!r}: wanted a list of names.")
    return tuple(values)


def _under(root: str | None, value: Any) -> Any:
    """A mapping with its relative paths below `root`; any other value unchanged."""
    if root is None or not isinstance(value, Mapping):
        return value
    return {key: str(Path(root).expanduser() / path) for key, path in value.items()}


def _task(name: str, config: Mapping[str, Any], root: str | None) -> Task:
    """The task with its own keys, and the published task's for any that are missing."""
    keys = _keys(name, config, root)
    if missing := _missing(keys):
        wanted = "source and classnames, or source and score, at least"
        raise ConfigError(f"taskpool.tasks.{name} has no {missing[0]}. Wanted: {wanted}.")
    names = keys.get("classnames") or []
    keys |= {"source": str(keys["source"]), "classnames": list(map(str, names)) if isinstance(names, list) else names}
    return Task(name, **{key: value for key, value in keys.items() if key != "folders"})


def _keys(name: str, config: Mapping[str, Any], root: str | None) -> dict[str, Any]:
    """The keys of a task that have a value, of its own or of the published task of this name; refuses unknown ones."""
    check_known(f"key of taskpool.tasks.{name}", config, _TASK_KEYS)
    keys = known(name) | {key: value for key, value in config.items() if value is not None}
    if root is not None and (folder := _folder_of(Path(root).expanduser(), name, keys)):
        keys["source"] = str(folder)
    return keys


def _missing(keys: Mapping[str, Any]) -> list[str]:
    """The keys that a task needs and has no value for."""
    needed = ("source",) if keys.get("score") is not None else ("source", "classnames")
    return [key for key in needed if not keys.get(key)]


def _folder_of(root: Path, name: str, keys: Mapping[str, Any]) -> Path | None:
    """A task's folder inside `root`, by its name or by the names in the papers' scripts; None if there is none.

    Case and punctuation may differ: stanford-cars matches stanford_cars, and dtd matches DTD.
    """
    names = [name, *keys.get("folders", ())]
    if exact := next((root / folder for folder in names if (root / folder).is_dir()), None):
        return exact
    folders = {plain(path.name): path for path in sorted(root.iterdir()) if path.is_dir()} if root.is_dir() else {}
    return next((folders[plain(folder)] for folder in names if plain(folder) in folders), None)


def _mapping(where: str, value: Any) -> dict[str, Any]:
    """The mapping under a key, empty for null; raises `ConfigError` for any other value."""
    if not isinstance(value, Mapping | None):
        raise ConfigError(f"{where}={value!r}: wanted names with a value each.")
    return dict(value or {})
