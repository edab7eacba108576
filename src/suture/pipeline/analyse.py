"""`suture analyse …`: an analysis of the models of a pool, on the tasks of a task pool where it needs any."""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from suture.analysis.accuracy import interpolation, landscape
from suture.analysis.bias import bias
from suture.analysis.finding import Finding
from suture.analysis.weights import layers, similarity, trimming
from suture.checkpoints import open_checkpoint
from suture.core.knobs import Knobs
from suture.core.progress import bar
from suture.errors import PRETRAINED, ConfigError, output_refusal, unknown_name
from suture.merging.merge import merge_task_vectors
from suture.merging.registry import MergeMethod
from suture.merging.task_vectors import TaskVectors
from suture.pipeline.models import OpenModels
from suture.pipeline.settings import Run
from suture.storage.atomic import new_folder

#: The analyses by name, and the knobs of each that the command line takes.
ANALYSES: dict[str, tuple[Callable[..., Finding], tuple[str, ...]]] = {
    "similarity": (similarity, ()),
    "layers": (layers, ()),
    "trimming": (trimming, ("threshold", "scope")),
    "interpolation": (interpolation, ("points",)),
    "landscape": (landscape, ("points",)),
    "bias": (bias, ("model",)),
}
INPUTS = 256  # of each task that representations are compared on


def analyse_configured(name: str, config: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[Finding, Path]:
    """Run one analysis and write it into `output`; returns the finding and the folder.

    `options` are the analysis's own knobs, and `models`, the names of the pool's models to be looked at.
    """
    options = dict(options)
    config = _only(config, options.pop("models", None))
    knobs = _checked(name, options)
    run = Run.from_config({**config, "surgery": {"kind": "none"}})
    if name in ("interpolation", "landscape", "bias") and run.taskpool is None:
        raise ConfigError(f"analyse {name} needs inputs. Remedy: name a taskpool=…")
    folder = Path(config["output"]) if config["output"] else new_folder(f"analysis/{name}")
    _check_folder(folder)
    models = OpenModels(run)
    models.preflight().refuse()
    analyse = _ON_INPUTS.get(name, _on_weights)
    found = analyse(ANALYSES[name][0], models, knobs)
    return found, found.save(folder)


def _check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be made or written into, before the work."""
    path = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not path.is_dir():
        raise output_refusal(path, "is a file, not a directory", "name another folder")
    if not os.access(path, os.W_OK):
        raise output_refusal(path, "cannot be written", "name another folder")


def _only(config: Mapping[str, Any], names: list[str] | None) -> dict[str, Any]:
    """The configuration with some of the pool's models, and their tasks."""
    pool, tasks = dict(config["modelpool"]), config.get("taskpool")
    if names is None:
        return dict(config)
    for name in names:
        if name not in pool["models"]:
            raise ConfigError(unknown_name("model of the pool", name, [n for n in pool["models"] if n != PRETRAINED]))
    pool["models"] = {name: pool["models"][name] for name in (PRETRAINED, *names) if name in pool["models"]}
    if tasks:
        tasks = {**tasks, "tasks": {name: task for name, task in tasks["tasks"].items() if name in names}}
    return {**config, "modelpool": pool, "taskpool": tasks}


def _checked(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    if name not in ANALYSES:
        raise ConfigError(unknown_name("analysis", name, ANALYSES))
    function, known = ANALYSES[name]
    for key in options:
        if key not in known:
            raise ConfigError(unknown_name(f"option of analyse {name}", key, [*known, "models", "output"]))
    checked = {key: value for key, value in options.items() if key != "model"}
    defaults = {key: value for key, value in Knobs(name, function).defaults.items() if key in checked}
    validated = Knobs(f"analyse {name}", partial(function, **defaults), "").validate(checked) if checked else {}
    return {**{key: validated[key] for key in checked}, **{k: v for k, v in options.items() if k == "model"}}


def _on_weights(function: Callable[..., Finding], models: OpenModels, knobs: Mapping[str, Any]) -> Finding:
    return function(models.base, models.models, frozen=models.run.frozen, **knobs)


def _on_tasks(function: Callable[..., Finding], models: OpenModels, knobs: Mapping[str, Any]) -> Finding:
    how = {"frozen": models.run.frozen, "batch_size": models.run.batch_size, "track": bar}
    return function(models.encoder, models.base, models.models, models.inputs("test"), **how, **knobs)


def _on_features(function: Callable[..., Finding], models: OpenModels, knobs: Mapping[str, Any]) -> Finding:
    """The model named, or the one that the method merges here, beside the experts."""
    run = models.run
    if path := knobs.get("model"):
        merged: Any = models.mergeable(open_checkpoint(path))
    elif isinstance(run.method, MergeMethod):
        merged = merge_task_vectors(TaskVectors(models.base, models.models, run.frozen), run.method, run.knobs)
    else:
        raise ConfigError(f"method={run.label} learns. Remedy: run it, then name what it left with model=RUN/model.")
    expert = lambda task: models.encoder.load(models.models[task])
    inputs = {task: data.first(INPUTS).inputs for task, data in models.inputs("test").items() if task in models.models}
    module = models.new_encoder().load(merged)
    return function(module, expert, inputs, batch_size=run.batch_size, track=bar)


_ON_INPUTS = {"interpolation": _on_tasks, "landscape": _on_tasks, "bias": _on_features}
