"""Find the weights in what a PyTorch file holds: a state dict, a training checkpoint, a whole module."""

from collections.abc import Mapping
from typing import Any

from suture.checkpoints.pickle_calls import Inert, TensorRef, Unsupported
from suture.errors import refusal, shown

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_MOST_NAMES = 200_000  # modules that hold each other in a tangle would give a name for every path through it
_STATE_DICT = "save the model's state_dict(), or better a safetensors file"


def weights(value: Any, where: object) -> Mapping[str, TensorRef]:
    """Name → tensor of the state dict that `value` is or holds.

    A wrapper's other entries (epoch, optimizer) are left aside; a flat dict must hold tensors and nothing
    else.
    """
    inner, wrapped = _unwrap(value)
    if _is_module(inner):
        found = _module_tensors(inner, where)
    elif isinstance(inner, dict):
        found = {n: t for n, t in inner.items() if not (isinstance(n, str) and n.endswith("_extra_state"))}
        if wrapped:
            found = {n: t for n, t in found.items() if isinstance(t, TensorRef | Unsupported)}
    else:
        raise refusal(where, f"holds {_kind(value)}, not a state dict or a module", _STATE_DICT)
    return _checked(found, where)


def _unwrap(value: Any) -> tuple[Any, bool]:
    wrapped = False
    for _ in range(4):
        value = _as_dict(value)
        inner = next((w for w in _WRAPPERS if isinstance(value, dict) and _holds_weights(value.get(w))), None)
        if inner is None:
            break
        value, wrapped = value[inner], True
    return value, wrapped


def _holds_weights(value: Any) -> bool:
    value = _as_dict(value)
    return _is_module(value) or (isinstance(value, dict) and len(value) > 0)


def _as_dict(value: Any) -> Any:
    """The items of an object whose class derives from dict."""
    return value.mapping if isinstance(value, Inert) and value.mapping and not _is_module(value) else value


def _is_module(value: Any) -> bool:
    return isinstance(value, Inert) and all(
        isinstance(value.state.get(part), dict) for part in ("_parameters", "_buffers", "_modules")
    )


def _module_tensors(module: Inert, where: object) -> dict[str, Any]:
    """What `state_dict()` would give: parameters and persistent buffers of the module and those in it."""
    found: dict[str, Any] = {}
    waiting: list[tuple[str, Inert, frozenset[int]]] = [("", module, frozenset())]
    while waiting:
        prefix, current, above = waiting.pop()
        if id(current) in above or len(found) + len(waiting) > _MOST_NAMES:
            raise refusal(where, "holds a module that contains itself or has too many parts", _STATE_DICT)
        fleeting = current.state.get("_non_persistent_buffers_set") or ()
        for part in ("_parameters", "_buffers"):
            own = {str(n): t for n, t in current.state[part].items() if t is not None and n not in fleeting}
            found.update({prefix + name: tensor for name, tensor in own.items()})
        inside = above | {id(current)}
        for name, child in current.state["_modules"].items():
            if _is_module(child):
                waiting.append((f"{prefix}{name}.", child, inside))
            elif child is not None:
                raise refusal(where, f"holds {_kind(child)} as the part '{shown(prefix + str(name))}'", _STATE_DICT)
    return found


def _checked(found: Mapping[Any, Any], where: object) -> Mapping[str, TensorRef]:
    if not any(isinstance(tensor, TensorRef | Unsupported) for tensor in found.values()):
        names = ", ".join(map(str, list(found)[:5])) or "nothing"
        raise refusal(where, f"holds no tensors, only: {names}", _STATE_DICT)
    for name, tensor in found.items():
        if not isinstance(name, str):
            raise refusal(where, f"has the key {shown(name)}, which is {_kind(name)} and no name", _STATE_DICT)
        if isinstance(tensor, Unsupported):
            raise refusal(where, f"holds {tensor.kind} under {shown(name)!r}", _STATE_DICT)
        if not isinstance(tensor, TensorRef):
            raise refusal(where, f"holds {_kind(tensor)}, not a tensor, under {shown(name)!r}", _STATE_DICT)
    return found


def _kind(value: Any) -> str:
    if isinstance(value, Inert):
        return f"an object of {value.name}"
    return "a tensor" if isinstance(value, TensorRef | Unsupported) else f"an object of {type(value).__name__}"
