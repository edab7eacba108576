"""mergekit's YAML (0.1.5) as a recipe: its methods, parameters, filters, gradients and slices, in its semantics.

What differs all the same is said in `notes` and in docs/merging-files.md. What is not known is refused.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from suture.checkpoints import Checkpoint, open_checkpoint, open_fine_tuned
from suture.errors import ConfigError, unknown_name
from suture.file_merge.chat import chat_template
from suture.file_merge.mergekit.methods import METHODS, Method
from suture.file_merge.mergekit.slices import Slice, assemble, configuration, count_layers, module_of, origins
from suture.file_merge.tensor_knobs import UNSET, Rules, depth_of, value_at
from suture.merging.registry import get_method

_TOP = ["merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype"]
_TOP += ["tokenizer_source", "tokenizer", "chat_template"]
_NOTES = ("Arithmetic is in float32 whatever dtype says; the result has dtype, or out_dtype where that is given.",)


class Part(NamedTuple):
    """A part of the result that has its own sources: a slice of layers, a module, or all; the parameters they share."""

    sources: Sequence[Mapping[str, Any]]
    shared: Sequence[Mapping[str, Any] | None]


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
    chat_template: str | None = None
    config: Callable[[Mapping[str, Any]], dict[str, Any]] = field(default=lambda config: {})


def read(path: str | Path) -> Translation:
    """Read a mergekit configuration; raises `ConfigError` in one line, with the nearest name for an unknown key."""
    told = _loaded(Path(path))
    _known("key", told, _TOP)
    if told.get("merge_method") not in METHODS:
        raise ConfigError(unknown_name("merge_method", str(told.get("merge_method")), METHODS))
    method = METHODS[told["merge_method"]]
    told, modules = _modules(told, path)
    _known_parameters(told, method, "the file")
    opened: dict[str, Checkpoint] = {}
    base = _opened(told["base_model"], opened) if told.get("base_model") else None
    if base is None and method.base == "needed":
        raise ConfigError(f"merge_method {told['merge_method']} needs a base_model.")
    parts = [part for module in modules.values() for part in _parts(module, method)]
    for source in (source for part in parts for source in part.sources):
        _opened(source["model"], opened)
    return _translation(told, method, base, parts, opened, list(modules))


def _modules(told: dict[str, Any], path: str | Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The file, and its modules; what has no modules is one."""
    given = [key for key in ("models", "slices", "modules") if told.get(key)]
    if len(given) != 1:
        raise ConfigError(f"'{path}' must have either models or slices or modules.")
    if given != ["modules"]:
        return told, {"default": {given[0]: told[given[0]]}}
    modules = told["modules"]
    _known("module", modules, list(modules) if isinstance(modules, Mapping) else [])
    for name, module in modules.items():
        _known(f"key of module {name}", module, ["models", "slices", "parameters"])
        if bool(module.get("models")) == bool(module.get("slices")):
            raise ConfigError(f"module {name} must have either models or slices.")
        if module.get("slices") and len(modules) > 1:
            raise ConfigError(f"module {name} is made of slices, which one module alone can be. Remedy: give models.")
    return told, dict(modules)


def _parts(module: Mapping[str, Any], method: Method) -> list[Part]:
    _known_parameters(module, method, "a module")
    found = [_sources(piece, method) for piece in module.get("slices") or [{"sources": module["models"]}]]
    return [Part(sources, (shared, module.get("parameters"))) for sources, shared in found]


def _translation(
    told, method: Method, base: Checkpoint | None, parts: Sequence[Part], opened: dict[str, Checkpoint], modules
) -> Translation:
    base_name = told.get("base_model")
    names = list(dict.fromkeys(source["model"] for part in parts for source in part.sources))
    sliced = any("layer_range" in source for part in parts for source in part.sources)
    if base is not None and base_name not in names and method.base == "model" and not sliced:
        names.append(base_name)  # as mergekit does
        parts = [part._replace(sources=[*part.sources, {"model": base_name}]) for part in parts]
    _check_sources(told, method, parts, names)
    stacks: list[Slice] = []
    if method.name == "passthrough":
        stacks = _one_each(parts, opened, sliced)
        models = {"slices": assemble(stacks, "slices")}
        labels = {"slices": None}
        base = models["slices"]
    else:
        merged = [name for name in names if name != base_name or method.base == "model"]
        layers = {name: _layers(name, parts, opened, sliced) for name in {*merged, *([base_name] if base else [])}}
        take = lambda name: assemble(layers[name], name) if sliced else opened[name]
        models, labels = {name: take(name) for name in merged}, {name: name for name in merged}
        stacks = layers[base_name if base else merged[0]] if sliced else []
        base = take(base_name) if base else None
    origin = {"origin": "base" if base is not None else "zero"} if method.base == "origin" else {}
    rules = lambda tensors: _rules(method, told, parts, stacks, modules, list(labels.values()), origin, tensors)
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
        chat_template=chat_template(told.get("chat_template"), list(opened.values())),
        config=lambda config: configuration(config, stacks) if stacks else {},
    )


def _check_sources(told, method: Method, parts: Sequence[Part], names: Sequence[str]) -> None:
    """A model that a slice or module does not name has no weight there; methods without weights have no such way."""
    if method.absent or method.name == "passthrough":
        return
    base = set() if method.base == "model" else {told.get("base_model")}
    if any({source["model"] for source in part.sources} - base != set(names) - base for part in parts):
        raise ConfigError(f"merge_method {told['merge_method']} needs the same models in all slices or modules.")


def _rules(
    method: Method, told, parts: Sequence[Part], stacks: Sequence[Slice], modules, labels, origin, tensors
) -> Rules:
    """The knobs of every tensor of the result."""
    where, depths = origins(stacks) if stacks else {}, depth_of(tensors)
    module = {} if stacks or len(modules) == 1 else module_of(tensors, modules)

    def knobs_of(name: str) -> dict[str, Any]:
        found = where.get(name)
        part = parts[found.slice if found else module.get(name, 0)]
        depth = found.depth if found else depths(name)

        def get(parameter: str, model: str | None = None, default: Any = None, required: bool = False) -> Any:
            if parameter == "weight" and model not in [source["model"] for source in part.sources]:
                return 0.0
            one = len(part.sources) == 1
            own = [s.get("parameters") for s in part.sources if model == s["model"] or (not model and one)]
            for level in (*own, *part.shared, told.get("parameters")):
                if level and parameter in level:
                    value = value_at(level[parameter], name, depth)
                    if value is not UNSET and value is not None:
                        return value
            if required:
                raise ConfigError(f"parameter {parameter} is missing for '{name}' of {model}.")
            return default

        return method.knobs(get, labels) | origin

    return Rules(get_method(method.name), knobs_of, tensors)


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


def _sources(piece: Any, method: Method) -> tuple[list[dict[str, Any]], Mapping[str, Any] | None]:
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


def _known_parameters(told: Mapping[str, Any], method: Method, where: str) -> None:
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


def _layers(name: str, parts: Sequence[Part], opened: Mapping[str, Checkpoint], sliced: bool) -> list[Slice]:
    """The slices of one of several models that are merged slice by slice."""
    if not sliced:
        return []
    found = []
    for part in parts:
        ranges = [source.get("layer_range") for source in part.sources if source["model"] == name]
        ranges = (
            ranges or [source.get("layer_range") for source in part.sources][:1]
        )  # a base that is not among the sources
        found.append(Slice(opened[name], *_range(ranges[0])))
    return found


def _one_each(parts: Sequence[Part], opened: Mapping[str, Checkpoint], sliced: bool) -> list[Slice]:
    """The slices of passthrough, each from one model."""
    stacks = []
    for sources, _ in parts:
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
