"""mergekit's YAML (0.1.5) as a merge: its methods, parameters, filters, gradients and slices, in its semantics.

What differs all the same is said in `notes` and in docs/merging-files.md. What is not known is refused.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

from suture.checkpoints import Checkpoint, open_checkpoint, open_fine_tuned
from suture.errors import ConfigError, shown, unknown_name
from suture.file_merge.mergekit.chat_template import choose_template
from suture.file_merge.mergekit.methods import METHODS, Method
from suture.file_merge.mergekit.slices import Slice, assemble, configuration, count_layers, module_of, origins
from suture.file_merge.mergekit.yaml_file import load_yaml
from suture.file_merge.tensor_knobs import UNSET, TensorKnobs, depth_of, value_at
from suture.merging.registry import get_method

_TOP = ["merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype", "name"]
_TOP += ["tokenizer_source", "tokenizer", "chat_template"]
#: Parameters that public cards carry along from other methods; mergekit pays no attention to them either.
_CARRIED_ALONG = ("embed_slerp", "int8_mask", "normalize")
_TEXTS = ("merge_method", "base_model", "dtype", "out_dtype", "name", "tokenizer_source")
_ONLY_SOURCE = ""  # the label of whichever model is the only source of a section
_NOTES = ("Arithmetic is in float32 whatever dtype says; the result has dtype, or out_dtype where that is given.",)


class Section(NamedTuple):
    """A section of the result that has its own sources: a slice of layers, a module, or all; and what they share."""

    sources: Sequence[Mapping[str, Any]]
    shared: Sequence[Mapping[str, Any] | None]


@dataclass(frozen=True)
class Translation:
    """The merge that a file describes, with its models opened. `content` is the file's."""

    content: Mapping[str, Any]
    base: Checkpoint | None
    models: Mapping[str, Checkpoint]
    method: str
    tensor_knobs: Callable[[Sequence[str]], TensorKnobs]
    dtype: str | None
    vocabulary: str
    name: str | None = None
    notes: Sequence[str] = ()
    slices: Sequence[Slice] = ()
    chat_template: str | None = None

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Changes to a model's configuration."""
        return configuration(config, self.slices) if self.slices else {}


def translate(path: str | Path, content: Mapping[str, Any] | None = None) -> Translation:
    """Read a mergekit configuration; raises `ConfigError` in one line, with the nearest name for an unknown key.

    `content` is one of several documents in the file, which are otherwise refused here.
    """
    documents = load_yaml(Path(path)) if content is None else [content]
    if len(documents) > 1:
        remedy = f"suture merge mergekit={path} output=…"
        raise ConfigError(f"'{path}' holds {len(documents)} documents. Remedy: {remedy}.")
    content = cast("dict[str, Any]", _with_paths(documents[0]))
    _check_keys("key", content, _TOP)
    for key in _TEXTS:
        if not isinstance(content.get(key), str | None):
            raise ConfigError(f"{key}: {shown(repr(content[key]))}: wanted a text.")
    if content.get("merge_method") not in METHODS:
        raise ConfigError(unknown_name("merge_method", str(content.get("merge_method")), METHODS))
    method = METHODS[content["merge_method"]]
    modules = _modules(content, path)
    _check_parameters(content, method, "the file")
    opened: dict[str, Checkpoint] = {}
    base = _opened(content["base_model"], opened) if content.get("base_model") else None
    if base is None and method.base == "needed":
        raise ConfigError(f"merge_method {content['merge_method']} needs a base_model.")
    sections = [section for module in modules.values() for section in _sections(module, method)]
    for source in (source for section in sections for source in section.sources):
        _opened(source["model"], opened)
    return _Builder(content, method, base, sections, opened, list(modules)).translation()


def _with_paths(content: Any) -> Any:
    """A configuration with every model as a text: mergekit also takes model: {model: {path: …}, lora: {path: …}}."""
    if isinstance(content, list):
        return [_with_paths(each) for each in content]
    if not isinstance(content, Mapping):
        return content
    return {
        key: _path(value) if key in ("model", "base_model") and isinstance(value, Mapping) else _with_paths(value)
        for key, value in content.items()
    }


def _path(reference: Mapping[str, Any]) -> str:
    """PATH@REVISION+LORA."""
    _check_keys("key of a model", reference, ["model", "lora", "path", "revision"])
    inner = reference.get("model", reference)
    inner = {"path": inner} if isinstance(inner, str) else inner
    lora = reference.get("lora")
    lora = lora.get("path") if isinstance(lora, Mapping) else lora
    _check_keys("key of a model", inner, ["path", "revision", *([] if inner is not reference else ["lora"])])
    if not isinstance(inner.get("path"), str):
        raise ConfigError(f"model: {shown(repr(dict(reference)))}: wanted a path.")
    revision = f"@{inner['revision']}" if inner.get("revision") else ""
    return f"{inner['path']}{revision}{f'+{lora}' if lora else ''}"


def _modules(content: Mapping[str, Any], path: str | Path) -> dict[str, Mapping[str, Any]]:
    """The modules of a file; what has no modules is one."""
    given = [key for key in ("models", "slices", "modules") if content.get(key)]
    if len(given) != 1:
        raise ConfigError(f"'{path}' must have either models or slices or modules.")
    if given != ["modules"]:
        return {"default": {given[0]: content[given[0]]}}
    modules = content["modules"]
    _check_keys("module", modules, list(modules) if isinstance(modules, Mapping) else [])
    for name, module in modules.items():
        _check_keys(f"key of module {name}", module, ["models", "slices", "parameters"])
        if bool(module.get("models")) == bool(module.get("slices")):
            raise ConfigError(f"module {name} must have either models or slices.")
        if module.get("slices") and len(modules) > 1:
            raise ConfigError(f"module {name} is made of slices, which one module alone can be. Remedy: give models.")
    return {str(name): module for name, module in modules.items()}


def _sections(module: Mapping[str, Any], method: Method) -> list[Section]:
    _check_parameters(module, method, "a module")
    slices = module.get("slices") or [{"sources": module["models"]}]
    if not isinstance(slices, list):
        raise ConfigError(f"slices: {shown(repr(slices))}: wanted a list of slices, each with its sources.")
    pairs = [_sources(piece, method) for piece in slices]
    return [Section(sources, (shared, module.get("parameters"))) for sources, shared in pairs]


def _sources(piece: Any, method: Method) -> tuple[list[dict[str, Any]], Mapping[str, Any] | None]:
    """The sources of a slice, each a model with its own parameters, and the parameters that they share."""
    _check_keys("key of a slice", piece, ["sources", "parameters"])
    sources = piece.get("sources")
    named = lambda source: isinstance(source, dict) and isinstance(source.get("model"), str) and source["model"]
    if not isinstance(sources, list) or not sources or not all(map(named, sources)):
        raise ConfigError("Each of models, or of a slice's sources, must have a model: PATH, with or without +LORA.")
    for source in sources:
        _check_keys("key of a model", source, ["model", "parameters", "layer_range"])
        _check_parameters(source, method, source["model"])
    _check_parameters(piece, method, "a slice")
    return sources, piece.get("parameters")


def _check_keys(kind: str, content: Any, known: Sequence[str]) -> None:
    if not isinstance(content, Mapping):
        raise ConfigError(f"{shown(repr(content))} is no mapping of keys: {', '.join(map(str, known))}.")
    for key in content:
        if key not in known:
            raise ConfigError(unknown_name(kind, shown(key), known))


def _check_parameters(content: Mapping[str, Any], method: Method, where: str) -> None:
    if content.get("parameters") is not None:
        given = content["parameters"]
        plain = {k: v for k, v in given.items() if k not in _unread(method)} if isinstance(given, Mapping) else given
        _check_keys(f"parameter in {where}", plain, method.parameters)


def _unread(method: Method) -> set[str]:
    return {name for name in _CARRIED_ALONG if name not in method.parameters}


def _ignored(content: Any, method: Method) -> set[str]:
    """Parameters carried along from other methods, which have no effect here, nor in mergekit."""
    if isinstance(content, list):
        return set().union(*(_ignored(each, method) for each in content))
    if not isinstance(content, Mapping):
        return set()
    given = content.get("parameters")
    own = set(given) - set(method.parameters) if isinstance(given, Mapping) else set()
    return own.union(*(_ignored(each, method) for key, each in content.items() if key != "parameters"))


def _opened(reference: str, opened: dict[str, Checkpoint]) -> Checkpoint:
    """A model by its path or hub id, with @REVISION and +LORA as mergekit writes them."""
    if reference not in opened:
        path, _, adapter = reference.partition("+")
        path, _, revision = path.partition("@")
        model = open_checkpoint(path, label=path, revision=revision or None)
        opened[reference] = open_fine_tuned(adapter, model, label=reference) if adapter else model
    return opened[reference]


@dataclass
class _Builder:
    """A checked file, its opened models, and the sections of the result."""

    content: Mapping[str, Any]
    method: Method
    base: Checkpoint | None
    sections: list[Section]
    opened: Mapping[str, Checkpoint]
    modules: Sequence[str]
    stacks: list[Slice] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.sliced = any("layer_range" in source for section in self.sections for source in section.sources)
        self.names = list(dict.fromkeys(source["model"] for section in self.sections for source in section.sources))
        name = self.content.get("base_model")
        if self.base is not None and name not in self.names and self.method.base == "model" and not self.sliced:
            self.names.append(name)  # as mergekit does
            self.sections = [s._replace(sources=[*s.sources, {"model": name}]) for s in self.sections]

    def translation(self) -> Translation:
        self._check_sources()
        passthrough = self.method.name == "passthrough"
        base, models = self._passed_through() if passthrough else self._merged()
        content = self.content
        return Translation(
            content=content,
            base=base,
            models=models,
            method=self.method.name,
            tensor_knobs=self._tensor_knobs,
            dtype=content.get("out_dtype") or content.get("dtype"),
            vocabulary=_vocabulary(content),
            name=content.get("name"),
            notes=(*_NOTES, *self.method.notes, *self._ignored_note()),
            slices=self.stacks,
            chat_template=choose_template(content.get("chat_template"), list(self.opened.values())),
        )

    def _ignored_note(self) -> list[str]:
        names = sorted(_ignored(self.content, self.method))
        return [f"{', '.join(names)}: no parameter of {self.content['merge_method']}, ignored."] if names else []

    def _check_sources(self) -> None:
        """A model that a section does not name has no weight there; methods without weights have no such way."""
        if self.method.absent or self.method.name == "passthrough":
            return
        base = set() if self.method.base == "model" else {self.content.get("base_model")}
        if any({s["model"] for s in section.sources} - base != set(self.names) - base for section in self.sections):
            method = self.content["merge_method"]
            raise ConfigError(f"merge_method {method} needs the same models in all slices or modules.")

    def _passed_through(self) -> tuple[Checkpoint, dict[str, Checkpoint]]:
        """One model put together from slices, each from one model."""
        for sources, _ in self.sections:
            if len(sources) != 1:
                raise ConfigError(f"passthrough takes one model for each slice; found {len(sources)}.")
            model = self.opened[sources[0]["model"]]
            layers = _layer_range(sources[0].get("layer_range")) if self.sliced else (0, count_layers(model))
            self.stacks.append(Slice(model, *layers))
        self.labels = [_ONLY_SOURCE]
        assembled = assemble(self.stacks, "slices")
        return assembled, {"slices": assembled}

    def _merged(self) -> tuple[Checkpoint | None, dict[str, Checkpoint]]:
        """Base and models, each put together from its slices where there are any."""
        base_name = str(self.content.get("base_model"))
        merged = [name for name in self.names if name != base_name or self.method.base == "model"]
        self.labels = list(merged)
        if not merged:
            raise ConfigError("There is no model to merge into base_model. Remedy: name another under models.")
        if not self.sliced:
            return self.base, {name: self.opened[name] for name in merged}
        self.stacks = self._stack(base_name if self.base is not None else merged[0])
        base = assemble(self.stacks, base_name) if self.base is not None else None
        return base, {name: assemble(self._stack(name), name) for name in merged}

    def _stack(self, name: str) -> list[Slice]:
        """The slices of one of several models that are merged slice by slice."""
        stack = []
        for section in self.sections:
            own = [source.get("layer_range") for source in section.sources if source["model"] == name]
            first = section.sources[0].get("layer_range")  # for a base that is not among the sources
            stack.append(Slice(self.opened[name], *_layer_range(own[0] if own else first)))
        return stack

    def _tensor_knobs(self, tensors: Sequence[str]) -> TensorKnobs:
        """The knobs of every tensor of the result."""
        where = origins(self.stacks) if self.stacks else {}
        depths = depth_of(tensors)
        module = {} if self.stacks or len(self.modules) == 1 else module_of(tensors, self.modules)
        origin = {"origin": "zero" if self.base is None else "base"} if self.method.base == "origin" else {}

        def values_of(name: str) -> dict[str, Any]:
            source = where.get(name)
            section = self.sections[source.slice if source else module.get(name, 0)]
            depth = source.depth if source else depths(name)
            parameters = _Parameters(section, self.content.get("parameters"), name, depth)
            return self.method.knobs(parameters.get, self.labels) | origin

        return TensorKnobs(get_method(self.method.name), values_of, tensors)


@dataclass(frozen=True)
class _Parameters:
    """The parameters of one tensor: those of a source go before those of its section, and these before the file's."""

    section: Section
    top: Mapping[str, Any] | None
    tensor: str
    depth: float

    def get(self, parameter: str, model: str | None = None, default: Any = None, required: bool = False) -> Any:
        """A number or truth value; `model` names the source that it belongs to."""
        sources = self.section.sources
        if parameter == "weight" and model not in [source["model"] for source in sources]:
            return 0.0
        own = [s.get("parameters") for s in sources if model == s["model"] or (not model and len(sources) == 1)]
        for level in (*own, *self.section.shared, self.top):
            if level and parameter in level:
                value = value_at(level[parameter], self.tensor, self.depth)
                if value is not UNSET and value is not None:
                    return self._number(parameter, value)
        if required:
            raise ConfigError(f"parameter {parameter} is missing for '{self.tensor}' of {model}.")
        return default

    def _number(self, parameter: str, value: Any) -> bool | int | float:
        if isinstance(value, bool | int | float) and abs(value) < 1e300:
            return value
        try:
            return float(value)  # YAML takes 1e-5 for a text
        except (TypeError, ValueError, OverflowError):
            problem = f"parameter {parameter} for '{self.tensor}': {shown(repr(value))}"
            raise ConfigError(f"{problem}: wanted a number, true or false.") from None


def _layer_range(value: Any) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or not all(type(layer) is int for layer in value):
        raise ConfigError(f"layer_range: {shown(repr(value))}: wanted [FIRST, END], two whole numbers.")
    return value[0], value[1]


def _vocabulary(content: Mapping[str, Any]) -> str:
    tokenizer = content.get("tokenizer") or {}
    _check_keys("key of tokenizer", tokenizer, ["source"])
    source = tokenizer.get("source") or content.get("tokenizer_source")
    if source in (None, "base", "union"):
        return source or "refuse"
    if source == content.get("base_model"):
        return "base"
    raise ConfigError(f"tokenizer_source: {shown(repr(source))} is not known here. Remedy: give base or union.")
