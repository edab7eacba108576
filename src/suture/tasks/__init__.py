"""A task: class names, templates, and the images or texts of a split. One file for each kind of source and of layout.

`check(task, split)` says what is wrong from headers alone; `load(task, split)` gives images and labels; `known` are the
tasks of the published benchmarks, whose words are data.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from suture.core.discovery import import_all
from suture.errors import ConfigError, DataError, SutureError, one_line, problem, shown
from suture.storage import hub
from suture.storage.addresses import ZOO_ADDRESS, zoo_path
from suture.tasks import layouts
from suture.tasks.base import SPLITS, Images, Source, Split, Task, Tensors, Texts
from suture.tasks.passages import Passage, Passages, read_passages
from suture.tasks.scoring import Scoring

__all__ = [
    "Images",
    "Passage",
    "Passages",
    "Scoring",
    "Source",
    "Split",
    "Task",
    "Tensors",
    "Texts",
    "check",
    "known",
    "load",
    "notes",
    "passages",
    "source_kinds",
]


def load(task: Task, split: Split) -> Images | Texts | Tensors:
    """The inputs and the labels of one split; raises `DataError` with the first problem that `check` names.

    A data set of a hub is downloaded first, unless it is in the hub's cache.
    """
    _refuse(check(task, split))
    if _is_on_hub(task):
        hub.download_dataset(task.source, task.subset)
        _refuse(check(task, split))  # once more, now that there is something to look at
    with _reading(task):
        folder, source = _source(_folder(task), split, task)
        return source.load(folder, split, task)


def passages(task: Task, split: Split) -> Passages:
    """The rows of a task with a `score`; raises `DataError` with the first problem. Downloads as `load` does."""
    if _is_on_hub(task):
        hub.download_dataset(task.source, task.subset)
    try:
        with _reading(task):
            return read_passages(_folder(task), split, task)
    except DataError as error:
        prefix = f"Task {task.name!r}: "
        line = str(error)
        raise DataError(line if line.startswith(prefix) else prefix + line) from error


def check(task: Task, split: Split) -> list[str]:
    """Everything wrong with a task, one line each; reads names, headers and labels but decodes no image."""
    if split not in SPLITS:
        raise ConfigError(f"Unknown split {split!r}. Known: {', '.join(SPLITS)}.")
    if task.score is not None:
        return _passage_problems(task, split)
    problems = [*_wording_problems(task), *_data_problems(task, split)]
    return [f"Task {task.name!r}: {problem}" for problem in problems]


def notes(task: Task, split: Split) -> list[str]:
    """Notes on a task without problems: data that are not there yet, or another number than published."""
    if _not_here_yet(task):
        return [f"Task {task.name!r}: '{task.source}' will be downloaded from the hub."]
    if task.score is not None:
        return []
    with _reading(task):
        folder, source = _source(_folder(task), split, task)
        count = source.count(folder, split, task)
    if split != "test" or count is None or not task.test_samples or count in task.test_samples:
        return []
    published = " or ".join(f"{size:,}" for size in task.test_samples)
    what = "texts" if task.text_columns else "images"
    return [f"Task {task.name!r}: {count:,} test {what}; published figures are for {published}."]


def _refuse(problems: list[str]) -> None:
    if problems:
        raise DataError(problems[0])


@cache
def known(name: str) -> dict[str, Any]:
    """The words of a published task (source, class names in label order, templates, …); empty for other names."""
    import yaml

    path = files(__name__) / "known" / f"{name}.yaml"
    return yaml.safe_load(path.read_text("utf-8")) if path.is_file() else {}


@cache
def source_kinds() -> dict[str, Source]:
    """The kinds of source by name: every module of `suture.tasks.sources`."""
    return {m.__name__.rsplit(".", 1)[-1]: m.SOURCE for m in import_all("suture.tasks.sources")}


def _passage_problems(task: Task, split: Split) -> list[str]:
    """The first problem of a task with a `score`, whose rows are read for it."""
    if len(task.templates) > 1:
        return [f"Task {task.name!r} has {len(task.templates)} templates; wanted one, or none. Remedy: leave one."]
    columns = task.text_columns or ("text",)
    template = next(iter(task.templates), None)
    missing = [column for column in columns if template is not None and "{" + column + "}" not in template]
    if missing:
        place = "{" + missing[0] + "}"
        return [f"Task {task.name!r}: template {template!r} has no {place}. Remedy: put {place} where it goes."]
    if _not_here_yet(task) and not hub.is_offline():
        return []  # as below
    try:
        passages(task, split)
    except SutureError as error:
        return [str(error)]
    return []


def _wording_problems(task: Task) -> list[str]:
    names = task.classnames
    problems = []
    if task.labels is not None and len(task.labels) != len(names):
        problems.append(f"it has {len(names)} class names but {len(task.labels)} labels. Remedy: list one for each.")
    if not names:
        problems.append("it has no class names. Remedy: list them in label order under `classnames`.")
    problems += [
        f"class name {shown(n)} is of type {type(n).__name__}, wanted text. Remedy: put it in quotes."
        for n in names
        if not isinstance(n, str)
    ]
    problems += [
        f"class name {n!r} is listed {names.count(n)} times. Remedy: give each class a name of its own."
        for n in dict.fromkeys(name for name in names if isinstance(name, str))
        if names.count(n) > 1
    ]
    return problems + [p for template in task.templates for p in _template_problems(str(template), task)]


def _template_problems(template: str, task: Task) -> list[str]:
    if task.text_columns is None:
        wanted = [] if "{}" in template else ["{}. Remedy: put {} where the class name goes."]
    else:
        places = ["{" + column + "}" for column in task.text_columns]
        wanted = [f"{place}. Remedy: put {place} where that text goes." for place in places if place not in template]
    return [f"template {template!r} has no {place}" for place in wanted]


def _data_problems(task: Task, split: Split) -> list[str]:
    try:
        if _not_here_yet(task) and not hub.is_offline():
            return []  # nothing is fetched for a look
        folder, source = _source(_folder(task), split, task)
        return source.problems(folder, split, task)
    except SutureError as error:
        return [str(error)]
    except Exception as error:
        return [_unreadable(task, error)]


@contextmanager
def _reading(task: Task) -> Iterator[None]:
    """Whatever a reader raises as a `DataError` of one line."""
    try:
        yield
    except SutureError:
        raise
    except Exception as error:
        raise DataError(f"Task {task.name!r}: {_unreadable(task, error)}") from error


def _unreadable(task: Task, error: Exception) -> str:
    """A line for what a reader did not foresee: the libraries for each format have errors of their own."""
    if isinstance(error, OSError) and error.strerror:
        where = error.filename or task.source
        return problem(where, f"cannot be read ({error.strerror})", "check the path and its permissions")
    reason = f"{type(error).__name__}: {one_line(error)}"
    return problem(task.source, f"cannot be read ({reason})", "check that it is the data set that the task names")


def _folder(task: Task) -> Path:
    if task.source.startswith(ZOO_ADDRESS):
        return zoo_path(task.source)
    if _is_on_hub(task):
        return hub.cached_dataset(task.source) or hub.download_dataset(task.source, task.subset)
    folder = Path(task.source).expanduser()
    if folder.is_dir():
        return folder
    siblings = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
    near = get_close_matches(folder.name, siblings, n=1, cutoff=0.5)
    hint = f" Did you mean '{folder.parent / near[0]}'?" if near else ""
    remedy = "put the data there or change the task's source"
    raise DataError(f"data folder '{shown(folder)}' does not exist.{hint} Remedy: {remedy}.")


def _is_on_hub(task: Task) -> bool:
    try:
        return not Path(task.source).expanduser().is_dir() and hub.is_hub_id(task.source)
    except (OSError, RuntimeError, ValueError):  # a name that is too long, ~ of nobody: it is no folder, and no id
        return False


def _not_here_yet(task: Task) -> bool:
    """Whether the data are on a hub, and not in its cache."""
    return _is_on_hub(task) and hub.cached_dataset(task.source) is None


def _source(folder: Path, split: Split, task: Task) -> tuple[Path, Source]:
    """The folder of the data and their reader: a layout of the task, any other kind, or a layout without this split."""
    if found := layouts.source(folder, split, task, of=(split,)):
        return found
    fitting = [source for source in source_kinds().values() if source.texts or not task.text_columns]
    for source in fitting:
        if source.found(folder):
            return folder, source
    if found := layouts.source(folder, split, task, of=SPLITS):
        return found
    wanted = " or ".join([*layouts.wanted(split, task), *(source.wanted for source in fitting)])
    there = sorted(p.name for p in folder.iterdir())[:4]
    there = shown(", ".join(there) or "nothing")
    raise DataError(f"'{shown(folder)}' holds {there}; wanted {wanted}. Remedy: put one of these there.")
