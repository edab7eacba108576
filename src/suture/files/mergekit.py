"""mergekit's YAML (0.1.5) as a recipe: its methods, parameters, filters, gradients and slices, in its semantics.

What differs all the same is said in `notes` and in docs/merging-files.md. What is not known is refused.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from suture.checkpoints import Checkpoint, open_checkpoint, open_fine_tuned
from suture.errors import ConfigError, unknown_name
from suture.files.settings import UNSET, Rules, depth_of, value_at
from suture.files.slices import Slice, assemble, configuration, count_layers, origins
from suture.methods import get_method

_TOP = ["merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype", "tokenizer_source"]
_TOP += ["tokenizer"]
_SHARED = ["weight", "density", "normalize", "rescale", "lambda", "int8_mask"]
Get = Callable[..., Any]


@dataclass(frozen=True)
class _Method:
    """One of mergekit's methods: ours, the parameters it takes, and how they become our knobs."""

    name: str
    parameters: Sequence[str]
    knobs: Callable[[Get, Sequence[str]], dict[str, Any]]
    needs_base: bool = True
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Translation:
    """What a file asks for, with its models opened."""

    told: Mapping[str, Any]
    base: Checkpoint | None
    models: Mapping[str, Checkpoint]
    method: str
    rules: Callable[[Sequence[str]], Rules]
    dtype: str | None
    vocabulary: str
    notes: Sequence[str] = ()
    slices: Sequence[Slice] = ()
    config: Callable[[Mapping[str, Any]], dict[str, Any]] = field(default=lambda config: {})


def read(path: str | Path) -> Translation:
    """Read a mergekit configuration; raises `ConfigError` in one line, with the nearest name for an unknown key."""
    told = _loaded(Path(path))
    _known("key", told, _TOP)
    if told.get("merge_method") not in METHODS:
        raise ConfigError(unknown_name("merge_method", str(told.get("merge_method")), METHODS))
    method = METHODS[told["merge_method"]]
    if bool(told.get("models")) == bool(told.get("slices")):
        raise ConfigError(f"'{path}' must have either models or slices.")
    _known_parameters(told, method, "the file")
    opened: dict[str, Checkpoint] = {}
    base = _opened(told["base_model"], opened) if told.get("base_model") else None
    if base is None and method.needs_base:
        raise ConfigError(f"merge_method {told['merge_method']} needs a base_model.")
    pieces = [_sources(piece, method) for piece in told.get("slices") or [{"sources": told["models"]}]]
    for sources, _ in pieces:
        for source in sources:
            _opened(source["model"], opened)
    return _translation(told, method, base, pieces, opened)


def _translation(told, method: _Method, base: Checkpoint | None, pieces, opened: dict[str, Checkpoint]) -> Translation:
    base_name = told.get("base_model")
    names = list(dict.fromkeys(source["model"] for sources, _ in pieces for source in sources))
    if base is not None and base_name not in names and not method.needs_base:
        names.append(base_name)  # as mergekit does
    sliced = bool(told.get("slices"))
    stacks: list[Slice] = []
    if method.name == "passthrough":
        stacks = _one_each(pieces, opened, sliced)
        models = {"slices": assemble(stacks, "slices")}
        labels = {"slices": None}
        base = models["slices"]
    else:
        merged = [name for name in names if name != base_name or not method.needs_base]
        layers = {name: _layers(name, pieces, opened, sliced) for name in {*merged, *([base_name] if base else [])}}
        take = lambda name: assemble(layers[name], name) if sliced else opened[name]
        models, labels = {name: take(name) for name in merged}, {name: name for name in merged}
        stacks = layers[base_name if base else merged[0]] if sliced else []
        base = take(base_name) if base else None
    rules = lambda tensors: _rules(method, told, pieces, stacks, list(labels.values()), tensors)
    return Translation(
        told=told,
        base=base,
        models=models,
        method=method.name,
        rules=rules,
        dtype=told.get("out_dtype") or told.get("dtype"),
        vocabulary=_vocabulary(told),
        notes=(*_NOTES, *method.notes),
        slices=stacks,
        config=lambda config: configuration(config, stacks) if stacks else {},
    )


def _rules(method: _Method, told, pieces, stacks: Sequence[Slice], labels, tensors: Sequence[str]) -> Rules:
    """The knobs of every tensor of the result."""
    where, depths = origins(stacks) if stacks else {}, depth_of(tensors)

    def knobs_of(name: str) -> dict[str, Any]:
        origin = where.get(name)
        sources, shared = pieces[origin.slice if origin else 0]
        depth = origin.depth if origin else depths(name)

        def get(parameter: str, model: str | None = None, default: Any = None, required: bool = False) -> Any:
            own = [s.get("parameters") for s in sources if model == s["model"] or (not model and len(sources) == 1)]
            for level in (*own, shared, told.get("parameters")):
                if level and parameter in level:
                    value = value_at(level[parameter], name, depth)
                    if value is not UNSET and value is not None:
                        return value
            if required:
                raise ConfigError(f"parameter {parameter} is missing for '{name}' of {model}.")
            return default

        return method.knobs(get, labels)

    return Rules(get_method(method.name), knobs_of, tensors)


def _weights(get: Get, labels: Sequence[str]) -> list[float]:
    return [float(get("weight", label, required=True)) for label in labels]


def _each(get: Get, labels: Sequence[str], parameter: str, default: float) -> float | list[float]:
    """One value if it is the same for all models."""
    values = [float(get(parameter, label, default)) for label in labels]
    return values[0] if len(set(values)) == 1 else values


def _same(get: Get, labels: Sequence[str], parameter: str, default: float) -> float:
    values = _each(get, labels, parameter, default)
    if isinstance(values, list):
        raise ConfigError(f"parameter {parameter} differs between models. Remedy: give one value for all.")
    return values


def _factor(get: Get, weights: Sequence[float], normalize: bool) -> float:
    """λ, over the sum of the weights if they are normalised."""
    total = sum(weights) if normalize and abs(sum(weights)) >= 1e-8 else 1.0
    return float(get("lambda", default=1.0)) / total


def _linear(get: Get, labels: Sequence[str]) -> dict[str, Any]:
    return {"weights": _weights(get, labels), "normalize": bool(get("normalize", default=True))}


def _arithmetic(get: Get, labels: Sequence[str]) -> dict[str, Any]:
    weights = _weights(get, labels)
    return {"weights": weights, "scaling_factor": _factor(get, weights, bool(get("normalize", default=False)))}


def _dare(get: Get, labels: Sequence[str]) -> dict[str, Any]:
    if not get("rescale", default=True):
        raise ConfigError("parameter rescale=false is not known to dare_linear here. Remedy: leave it out.")
    return _arithmetic(get, labels) | {"density": _each(get, labels, "density", 1.0)}


def _breadcrumbs(get: Get, labels: Sequence[str]) -> dict[str, Any]:
    gamma = _same(get, labels, "gamma", 0.01)
    _no_rescale(get)
    return _arithmetic(get, labels) | {"density": _each(get, labels, "density", 1.0), "gamma": gamma}


def _elected(get: Get, labels: Sequence[str], normalize: bool) -> dict[str, Any]:
    merge_func = "mean" if get("normalize", default=normalize) else "sum"
    return {"weights": _weights(get, labels), "scaling_factor": _factor(get, (), False), "merge_func": merge_func}


def _ties(get: Get, labels: Sequence[str]) -> dict[str, Any]:
    _no_rescale(get)
    return _elected(get, labels, True) | {"threshold": _each(get, labels, "density", 1.0), "scope": "tensor"}


def _dare_ties(get: Get, labels: Sequence[str]) -> dict[str, Any]:
    density, rescale = _each(get, labels, "density", 1.0), bool(get("rescale", default=True))
    return _elected(get, labels, False) | {"density": density, "rescale": rescale}


def _della(get: Get, labels: Sequence[str]) -> dict[str, Any]:
    density, epsilon = _each(get, labels, "density", 1.0), _same(get, labels, "epsilon", 0.15)
    if not get("rescale", default=True):
        raise ConfigError("parameter rescale=false is not known to della here. Remedy: leave it out.")
    return _elected(get, labels, True) | {"density": density, "epsilon": 0.0 if density == 1.0 else epsilon}


def _model_stock(get: Get, labels: Sequence[str]) -> dict[str, Any]:
    if get("filter_wise", default=False):
        raise ConfigError("parameter filter_wise=true is not known to model_stock here. Remedy: leave it out.")
    return {}


def _no_rescale(get: Get) -> None:
    if get("rescale", default=False):
        raise ConfigError("parameter rescale=true is not known to this method here. Remedy: leave it out.")


_SAMPLE = "What is dropped at random is another sample than mergekit's: by seed, model, tensor and position."
_RESCALE = f"{_SAMPLE} What stays is divided by its probability, not scaled to the L1 norm from before."
_NOTES = ("Arithmetic is in float32 whatever dtype says; the result has dtype, or out_dtype where that is given.",)
METHODS: dict[str, _Method] = {
    "linear": _Method("simple_average", ["weight", "normalize"], _linear, needs_base=False),
    "task_arithmetic": _Method("task_arithmetic", _SHARED, _arithmetic),
    "ties": _Method("ties_merging", _SHARED, _ties, notes=("Entries of equal magnitude stay or go together.",)),
    "dare_linear": _Method("dare_l1", _SHARED, _dare, notes=(_SAMPLE,)),
    "dare_ties": _Method("dare_ties", _SHARED, _dare_ties, notes=(_RESCALE,)),
    "breadcrumbs": _Method(
        "breadcrumbs", [*_SHARED, "gamma"], _breadcrumbs, notes=("Entries of equal magnitude stay or go together.",)
    ),
    "della": _Method("della", [*_SHARED, "epsilon"], _della, notes=(_RESCALE,)),
    "slerp": _Method("slerp", ["t"], lambda get, labels: {"t": float(get("t", labels[0], required=True))}),
    "model_stock": _Method("model_stock", ["filter_wise"], _model_stock),
    "sce": _Method(
        "sce", ["select_topk", "int8_mask"], lambda get, _: {"select_topk": float(get("select_topk", default=1.0))}
    ),
    "karcher": _Method(
        "karcher",
        ["max_iter", "tol"],
        lambda get, _: {"max_iter": int(get("max_iter", default=10)), "tol": float(get("tol", default=1e-5))},
        needs_base=False,
        notes=("The mean is found from the models' inner products in float64, in one pass.",),
    ),
    "passthrough": _Method(
        "passthrough", ["scale"], lambda get, _: {"scale": float(get("scale", default=1.0))}, needs_base=False
    ),
}


def _loaded(path: Path) -> dict[str, Any]:
    from yaml import YAMLError, safe_load

    try:
        told = safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"mergekit={path} cannot be read: {error.strerror or error}.") from None
    except YAMLError as error:
        raise ConfigError(f"mergekit={path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(told, dict):
        raise ConfigError(f"mergekit={path} holds no configuration. Remedy: give a YAML file with a merge_method.")
    return told


def _sources(piece: Any, method: _Method) -> tuple[list[dict[str, Any]], Mapping[str, Any] | None]:
    """The sources of a slice, each a model with its own parameters, and the parameters that they share."""
    _known("key of a slice", piece, ["sources", "parameters"])
    sources = piece.get("sources")
    if not isinstance(sources, list) or not all(
        isinstance(s, dict) and isinstance(s.get("model"), str) for s in sources
    ):
        raise ConfigError("Each of models, or of a slice's sources, must have a model: PATH, with or without +LORA.")
    for source in sources:
        _known("key of a model", source, ["model", "parameters", "layer_range"])
        _known_parameters(source, method, source["model"])
    _known_parameters(piece, method, "a slice")
    return sources, piece.get("parameters")


def _known(kind: str, told: Any, known: Sequence[str]) -> None:
    if not isinstance(told, Mapping):
        raise ConfigError(f"{told!r} is no mapping of keys: {', '.join(known)}.")
    for key in told:
        if key not in known:
            raise ConfigError(unknown_name(kind, str(key), known))


def _known_parameters(told: Mapping[str, Any], method: _Method, where: str) -> None:
    if told.get("parameters") is not None:
        _known(f"parameter in {where}", told["parameters"], method.parameters)


def _opened(reference: str, opened: dict[str, Checkpoint]) -> Checkpoint:
    """A model by its path or hub id, with @REVISION and +LORA as mergekit writes them."""
    if reference not in opened:
        path, _, adapter = str(reference).partition("+")
        path, _, revision = path.partition("@")
        model = open_checkpoint(path, label=path, revision=revision or None)
        opened[reference] = open_fine_tuned(adapter, model, label=reference) if adapter else model
    return opened[reference]


def _layers(name: str, pieces, opened: Mapping[str, Checkpoint], sliced: bool) -> list[Slice]:
    """The slices of one of several models that are merged slice by slice."""
    if not sliced:
        return []
    found = []
    for sources, _ in pieces:
        ranges = [source.get("layer_range") for source in sources if source["model"] == name]
        ranges = ranges or [source.get("layer_range") for source in sources][:1]  # a base that is not among the sources
        found.append(Slice(opened[name], *_range(ranges[0])))
    return found


def _one_each(pieces, opened: Mapping[str, Checkpoint], sliced: bool) -> list[Slice]:
    """The slices of passthrough, each from one model."""
    stacks = []
    for sources, _ in pieces:
        if len(sources) != 1:
            raise ConfigError(f"passthrough takes one model for each slice; found {len(sources)}.")
        model = opened[sources[0]["model"]]
        whole = (0, count_layers(model))
        stacks.append(Slice(model, *(_range(sources[0].get("layer_range")) if sliced else whole)))
    return stacks


def _range(told: Any) -> tuple[int, int]:
    if not isinstance(told, list) or len(told) != 2 or not all(isinstance(layer, int) for layer in told):
        raise ConfigError(f"layer_range: {told!r}: wanted [FIRST, END], two whole numbers.")
    return told[0], told[1]


def _vocabulary(told: Mapping[str, Any]) -> str:
    tokenizer = told.get("tokenizer") or {}
    _known("key of tokenizer", tokenizer, ["source"])
    source = tokenizer.get("source") or told.get("tokenizer_source")
    if source in (None, "base", "union"):
        return source or "refuse"
    if source == told.get("base_model"):
        return "base"
    raise ConfigError(f"tokenizer_source: {source!r} is not known here. Remedy: give base or union.")
