"""Analyses of a pool's models, on the tasks of a task pool if they need any."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from suture.analysis import Finding, save
from suture.analysis.registry import Analysis, get_analysis
from suture.checkpoints import open_checkpoint
from suture.core.batch_sizes import fixed_size
from suture.core.extras import check_installed
from suture.core.knobs import Knobs
from suture.core.progress import Profile, bar
from suture.errors import PRETRAINED, ConfigError, check_known
from suture.evaluation import SplitInputs
from suture.pipeline import config as configuration
from suture.pipeline.context import Context
from suture.pipeline.models import Models, open_models
from suture.pipeline.pipeline import prepare
from suture.pipeline.preflight import preflight_of, refuse_split
from suture.pipeline.repairs import NONE
from suture.pipeline.settings import Settings
from suture.storage.atomic import check_writable, new_folder

INPUTS = 256  # inputs of each task on which representations are compared


def analyse(
    name: str,
    config: Mapping[str, Any] | Sequence[str] | None = None,
    /,
    *,
    options: Mapping[str, Any] | None = None,
    **keywords: Any,
) -> tuple[Finding, Path]:
    """Run one analysis on the models of a pool and write it into `output`; returns the finding and the folder.

    The configuration is given as for `suture.run`. `options` are the analysis's own knobs, and `models`: the names of
    the pool's models to analyse.
    """
    check_installed("suture analyse")
    options = dict(options or {})
    composed = configuration.composed(config, keywords, method="simple_average")
    config = _only(composed, options.pop("models", None))
    chosen = get_analysis(name)
    knobs = _checked(chosen, options)
    settings = Settings.from_config({**config, "repair": {"kind": NONE}})
    if chosen.reads != "weights" and not settings.tasks:
        raise ConfigError(f"analyse {name} needs inputs. Remedy: name a taskpool=…")
    folder = Path(config["output"]) if config["output"] else new_folder(f"analysis/{name}")
    check_writable(folder)
    refuse_split(settings, "an analysis")
    models = open_models(settings.pool, settings.threads, channels_last=settings.channels_last)
    preflight_of(models, settings).refuse()
    context, inputs = prepare(settings, models, folder, Profile())
    finding = _RUNNERS[chosen.reads](chosen.function, knobs, settings, models, inputs, context)
    return finding, save(finding, folder)


def _only(config: Mapping[str, Any], names: list[str] | None) -> dict[str, Any]:
    """The configuration with only some of the pool's models and their tasks."""
    pool, tasks = dict(config["modelpool"]), config.get("taskpool")
    if names is None:
        return dict(config)
    check_known("model of the pool", names, [name for name in pool["models"] if name != PRETRAINED])
    pool["models"] = {name: pool["models"][name] for name in (PRETRAINED, *names) if name in pool["models"]}
    if tasks:
        tasks = {**tasks, "tasks": {name: task for name, task in tasks["tasks"].items() if name in names}}
    return {**config, "modelpool": pool, "taskpool": tasks}


def _checked(chosen: Analysis, options: Mapping[str, Any]) -> dict[str, Any]:
    known = (*chosen.keys, *_MERGED[chosen.reads])
    check_known(f"option of analyse {chosen.name}", options, [*known, "models", "output"])
    merged = {key: value for key, value in options.items() if key in _MERGED[chosen.reads]}
    own = {key: value for key, value in options.items() if key not in merged}
    if not own:
        return merged
    typed = partial(chosen.function, **{key: chosen.defaults[key] for key in own})
    validated = Knobs(f"analyse {chosen.name}", typed, "--").validate(own)
    return {**{key: validated[key] for key in own}, **merged}


Analyse = Callable[..., Finding]
Values = Mapping[str, Any]


def _on_weights(
    function: Analyse, knobs: Values, settings: Settings, models: Models, inputs: SplitInputs, context: Context
) -> Finding:
    return function(models.base, models.experts, frozen=_frozen(settings), **knobs)


def _on_tasks(
    function: Analyse, knobs: Values, settings: Settings, models: Models, inputs: SplitInputs, context: Context
) -> Finding:
    scoring = {"batch_size": settings.batch_size, "track": bar}
    encoder = models.new_encoder(context.device.device)
    return function(encoder, models.base, models.experts, inputs["test"], frozen=_frozen(settings), **scoring, **knobs)


def _on_features(
    function: Analyse, knobs: Values, settings: Settings, models: Models, inputs: SplitInputs, context: Context
) -> Finding:
    """Compare the `model`, or else a new merge by the method, with the experts."""
    if path := knobs.get("model"):
        merged: Any = models.mergeable(open_checkpoint(path))
    elif settings.method.static is not None:
        merged = settings.method.merge(models, inputs, context).tensors
    else:
        label = settings.method.label
        problem = f"method={label} is more than one merge of weights: it learns, or leaves a model for each task"
        raise ConfigError(f"{problem}. Remedy: run it, then name the model it saved with model=RUN/model.")
    device, test = context.device.device, inputs["test"]
    module, other = models.new_encoder(device).load(merged), models.new_encoder(device)

    def expert(task: str) -> Any:
        return other.load(models.experts[task])

    few = {task: data.first(INPUTS).inputs for task, data in test.items() if task in models.experts}
    knobs = {key: value for key, value in knobs.items() if key not in _MERGED["features"]}
    return function(module, expert, few, batch_size=fixed_size(settings.batch_size), track=bar, **knobs)


def _frozen(settings: Settings) -> tuple[str, ...]:
    return (*settings.pool.frozen, *settings.method.frozen)


_RUNNERS = {"weights": _on_weights, "tasks": _on_tasks, "features": _on_features}
#: The options that say which merged model is analysed.
_MERGED = {"weights": (), "tasks": (), "features": ("model",)}
