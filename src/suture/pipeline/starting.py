"""Pools for a start: the YAML files of models and tasks that lie in some folders, with comments on what to fill in."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from suture.errors import PRETRAINED, ConfigError, OutputError
from suture.families import families, family
from suture.pipeline.starting_tasks import FILL_IN, key, quoted, task_pool
from suture.storage.atomic import disk_errors, write_text
from suture.tasks import source_kinds
from suture.tasks.class_names import plain

WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_BASES = ("pretrained", "base", "basemodel", "original", "init", "zeroshot")  # names, without case and punctuation
_ADAPTER = "adapter_config.json"
_CONFIGS = ("config.json", "open_clip_config.json", _ADAPTER)
_DEPTH = 2  # folders below a given one that are looked into
_SPLITS = ("train", "test", "val")
_DATA = (*_SPLITS, "validation", "valid")  # names of files of tensors that are data
_MODULE = "module:  # fill in: package.module:function or path/to/file.py:function, which makes the network and is run"
_ARGUMENTS = "# arguments: {width: 64}   # of that function, if it takes any"


@dataclass(frozen=True)
class Started:
    """The files written: a model pool, and a task pool if there are data; the lines say what is left to do."""

    modelpool: Path
    taskpool: Path | None
    lines: tuple[str, ...]


def init(
    folders: Sequence[str | Path],
    output: str | Path = ".",
    *,
    base: str | Path | None = None,
    family: str | None = None,
) -> Started:
    """Look at folders of models and data, and write `models.yaml` and `tasks.yaml` into `output`.

    `base` is the pretrained model, by default the one whose name says so (pretrained, base, …), or the only one that is
    no adapter. `family` is by default
    that of the fine-tuned models' configurations. Only names and configurations are read. Raises `ConfigError` if
    there is no model or no base among them, and `OutputError` rather than overwrite a file.
    """
    places = [Path(folder).expanduser() for folder in folders]
    for place in places:
        if not place.exists():
            raise ConfigError(f"{str(place)!r} does not exist. Remedy: name folders of models and of data.")
    models, data = _unique(_models(places)), _unique(_data(places))
    pretrained = _base(models, base)
    experts = {name: path for name, path in models.items() if path != pretrained}
    if not experts:
        raise ConfigError(f"There is no fine-tuned model in {', '.join(map(str, places))}. Remedy: name their folders.")
    chosen = family or _family_of(pretrained, experts.values())
    folder = Path(output).expanduser()
    pools = {"models.yaml": _model_pool(chosen, pretrained, experts)}
    if tasks := task_pool(chosen, experts, data):
        pools["tasks.yaml"] = tasks
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name in pools:
        if (folder / name).exists():
            raise OutputError(f"'{folder / name}' exists. Remedy: remove it, or name another folder for it (--output).")
    for name, text in pools.items():
        write_text(folder / name, text)
    taskpool = folder / "tasks.yaml" if tasks else None
    return Started(folder / "models.yaml", taskpool, tuple(_next_lines(folder, chosen, experts, data, tasks)))


def _models(places: Iterable[Path]) -> Iterator[Path]:
    """Model directories, adapters and files of weights."""
    for path in _all(places):
        beside = path.suffix in WEIGHTS and not _is_model(path.parent) and path.stem not in _DATA
        if beside or _is_model(path):
            yield path


def _data(places: Iterable[Path]) -> Iterator[Path]:
    """Folders that a kind of data source recognises."""
    kinds = source_kinds().values()
    for path in _all(places):
        if path.is_dir() and not _is_model(path) and any(kind.found(path) for kind in kinds):
            yield path


def _is_model(path: Path) -> bool:
    return any((path / name).is_file() for name in _CONFIGS)


def _all(places: Iterable[Path]) -> Iterator[Path]:
    for place in places:
        yield from _walk(place, _DEPTH)


def _walk(place: Path, depth: int) -> Iterator[Path]:
    """A path and what is below it, sorted; nothing below a model directory, and nothing hidden."""
    yield place
    if place.is_dir() and depth and not _is_model(place):
        for path in sorted(place.iterdir()):
            if not path.name.startswith("."):
                yield from _walk(path, depth - 1)


def _unique(paths: Iterable[Path]) -> dict[str, Path]:
    """Name → path; where two have one name, the folder's name comes first."""
    named: dict[str, Path] = {}
    for path in dict.fromkeys(paths):
        name = path.stem if path.is_file() else path.resolve().name
        named[f"{path.parent.name}-{name}" if name in named else name] = path
    return named


def _base(models: dict[str, Path], given: str | Path | None) -> Path:
    if given is not None:
        path = Path(given).expanduser()
        found = next((each for each in models.values() if each.resolve() == path.resolve()), None)
        return found or models.get(str(given)) or path
    named = [path for name, path in models.items() if plain(name) in _BASES]
    if not named:  # beside adapters the one whole model
        named = [path for path in models.values() if not (path / _ADAPTER).is_file()]
        named = named if len(named) < len(models) else []
    if len(named) != 1:
        known = ", ".join(models) or "no model"
        problem = f"Which is the pretrained model? Found: {known}."
        raise ConfigError(f"{problem} Remedy: name it with --base PATH.")
    return named[0]


def _family_of(base: Path, experts: Iterable[Path]) -> str:
    """The family of the fine-tuned models' configurations, or else of the base's, whose head may be of another kind.

    For a file of weights alone it is a module of the caller's.
    """
    if base.is_file() and not _is_model(base.parent):
        return "module"
    of_experts = {name for path in experts if (name := _recognised(path))}
    if chosen := of_experts.pop() if len(of_experts) == 1 else _recognised(base):
        return chosen
    known = ", ".join(families())
    raise ConfigError(f"{str(base)!r} is of no known family. Remedy: name one with --family: {known}.")


def _recognised(path: Path) -> str | None:
    return next((name for name in families() if path.is_dir() and family(name).recognises(path)), None)


def _model_pool(chosen: str, base: Path, experts: dict[str, Path]) -> str:
    lines = [
        "# The models to merge. `suture check modelpool=models.yaml` says whether they fit together.",
        "# Paths start from the folder in which a command is typed.",
        "",
    ]
    lines += [
        f"family: {chosen}",
        *([_MODULE, _ARGUMENTS] if chosen == "module" else []),
        "models:",
        f"  {PRETRAINED}: {quoted(base)}",
    ]
    return "\n".join([*lines, *(f"  {key(name)}: {quoted(path)}" for name, path in experts.items())]) + "\n"


def _next_lines(folder: Path, chosen: str, experts: dict[str, Path], data: dict[str, Path], tasks: str) -> list[str]:
    lines = [f"family {chosen}; {len(experts)} fine-tuned model{'s' * (len(experts) > 1)}: {', '.join(experts)}"]
    if chosen == "module":
        lines.append(f"fill in `module` in {folder / 'models.yaml'}: the function that makes the network")
    if FILL_IN in tasks:
        lines.append(f"fill in what is marked in {folder / 'tasks.yaml'}")
    used = {plain(expert) for expert in experts}
    inside = [path.parent for name, path in data.items() if plain(name) in used]  # folders of data that are used
    unused = [name for name, path in data.items() if plain(name) not in used and path not in inside]
    if unused:
        lines.append(f"data without a model of their name: {', '.join(unused)}")
    return lines
