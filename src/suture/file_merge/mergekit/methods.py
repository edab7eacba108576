"""mergekit's methods (0.1.5): ours for each, the parameters it takes, and how they become our knobs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from suture.errors import ConfigError

_SHARED = ["weight", "density", "normalize", "rescale", "lambda", "int8_mask"]
Get = Callable[..., Any]


@dataclass(frozen=True)
class Method:
    """One of mergekit's methods.

    `base` says what base_model is to it: needed, the origin that models are seen from where it is given, or one more
    model.
    """

    name: str
    parameters: Sequence[str]
    knobs: Callable[[Get, Sequence[str]], dict[str, Any]]
    base: Literal["needed", "origin", "model"] = "needed"
    notes: Sequence[str] = ()

    @property
    def absent(self) -> bool:
        """Whether a model of weight 0 is as one that is not there."""
        return "weight" in self.parameters and self.name != "nuslerp"


def _weights(get: Get, labels: Sequence[str]) -> list[float]:
    return [float(get("weight", label, required=True)) for label in labels]


def _each(get: Get, labels: Sequence[str], parameter: str, default: float) -> float | list[float]:
    return _one([float(get(parameter, label, default)) for label in labels])


def _one(values: list[float]) -> float | list[float]:
    """One value if it is the same for all models."""
    return values[0] if len(set(values)) == 1 else values


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
    density = _each(get, labels, "density", 1.0)
    return _arithmetic(get, labels) | {"density": density, "rescale": bool(get("rescale", default=True))}


def _outliers(get: Get, labels: Sequence[str]) -> dict[str, Any]:
    _no_rescale(get)
    return {"density": _each(get, labels, "density", 1.0), "gamma": _each(get, labels, "gamma", 0.01)}


def _elected(get: Get, labels: Sequence[str], normalize: bool) -> dict[str, Any]:
    merge_func = "mean" if get("normalize", default=normalize) else "sum"
    return {"weights": _weights(get, labels), "scaling_factor": _factor(get, (), False), "merge_func": merge_func}


def _ties(get: Get, labels: Sequence[str]) -> dict[str, Any]:
    _no_rescale(get)
    return _elected(get, labels, True) | {"threshold": _each(get, labels, "density", 1.0), "scope": "tensor"}


def _rescale(get: Get) -> bool | str:
    return "l1" if get("rescale", default=True) else False


def _dare_ties(get: Get, labels: Sequence[str]) -> dict[str, Any]:
    return _elected(get, labels, False) | {"density": _each(get, labels, "density", 1.0), "rescale": _rescale(get)}


def _magnitudes(get: Get, labels: Sequence[str]) -> dict[str, Any]:
    """A model of which all is kept has no epsilon."""
    densities = [float(get("density", label, 1.0)) for label in labels]
    reaches = [
        float(get("epsilon", label, 0.15)) if density < 1 else 0.0
        for label, density in zip(labels, densities, strict=True)
    ]
    return {"density": _one(densities), "epsilon": _one(reaches), "rescale": _rescale(get)}


def _slerp(get: Get, labels: Sequence[str]) -> dict[str, Any]:
    return {"t": float(get("t", labels[0], required=True))}


def _nuslerp(get: Get, labels: Sequence[str]) -> dict[str, Any]:
    if not get("nuslerp_flatten", default=True) or get("nuslerp_row_wise", default=False):
        raise ConfigError("nuslerp here takes a tensor as one vector. Remedy: leave out nuslerp_flatten and _row_wise.")
    return {"weights": _weights(get, labels)}


def _multislerp(get: Get, labels: Sequence[str]) -> dict[str, Any]:
    return {"weights": _weights(get, labels), "normalize": bool(get("normalize_weights", default=True))}


def _numbers(*defaults: tuple[str, float]) -> Callable[[Get, Sequence[str]], dict[str, Any]]:
    """Knobs that have the parameters' names and kinds."""
    return lambda get, labels: {name: type(default)(get(name, default=default)) for name, default in defaults}


def _model_stock(get: Get, labels: Sequence[str]) -> dict[str, Any]:
    if get("filter_wise", default=False):
        raise ConfigError("parameter filter_wise=true is not known to model_stock here. Remedy: leave it out.")
    return {}


def _no_rescale(get: Get) -> None:
    if get("rescale", default=False):
        raise ConfigError("parameter rescale=true is not known to this method here. Remedy: leave it out.")


_SAMPLE = "What is dropped at random is another sample than mergekit's: by seed, model, tensor and position."
_TOGETHER = "Entries of equal magnitude stay or go together."
METHODS: dict[str, Method] = {
    "linear": Method("simple_average", ["weight", "normalize"], _linear, base="model"),
    "task_arithmetic": Method("task_arithmetic", _SHARED, _arithmetic),
    "ties": Method("ties_merging", _SHARED, _ties, notes=(_TOGETHER,)),
    "dare_linear": Method("dare_l1", _SHARED, _dare, notes=(_SAMPLE,)),
    "dare_ties": Method("dare_ties", _SHARED, _dare_ties, notes=(_SAMPLE,)),
    "breadcrumbs": Method(
        "breadcrumbs",
        [*_SHARED, "gamma"],
        lambda get, labels: _arithmetic(get, labels) | _outliers(get, labels),
        notes=(_TOGETHER,),
    ),
    "breadcrumbs_ties": Method(
        "breadcrumbs_ties",
        [*_SHARED, "gamma"],
        lambda get, labels: _elected(get, labels, False) | _outliers(get, labels),
        notes=(_TOGETHER,),
    ),
    "della": Method(
        "della",
        [*_SHARED, "epsilon"],
        lambda get, labels: _elected(get, labels, True) | _magnitudes(get, labels),
        notes=(_SAMPLE,),
    ),
    "della_linear": Method(
        "della_linear",
        [*_SHARED, "epsilon"],
        lambda get, labels: _arithmetic(get, labels) | _magnitudes(get, labels),
        notes=(_SAMPLE,),
    ),
    "slerp": Method("slerp", ["t"], _slerp),
    "nuslerp": Method("nuslerp", ["weight", "nuslerp_flatten", "nuslerp_row_wise"], _nuslerp, base="origin"),
    "multislerp": Method("multislerp", ["weight", "normalize_weights"], _multislerp, base="origin"),
    "nearswap": Method("nearswap", ["t"], _slerp),
    "model_stock": Method("model_stock", ["filter_wise"], _model_stock),
    "ram": Method("ram", ["epsilon"], _numbers(("epsilon", 1e-5))),
    "ramplus_tl": Method(
        "ramplus_tl", ["r", "alpha", "epsilon"], _numbers(("r", 0.1), ("alpha", 0.2), ("epsilon", 1e-5))
    ),
    "sce": Method("sce", ["select_topk", "int8_mask"], _numbers(("select_topk", 1.0))),
    "karcher": Method(
        "karcher",
        ["max_iter", "tol"],
        _numbers(("max_iter", 10), ("tol", 1e-5)),
        base="model",
        notes=("The mean is found from the models' inner products in float64, in one pass.",),
    ),
    "passthrough": Method("passthrough", ["scale"], _numbers(("scale", 1.0)), base="model"),
}
