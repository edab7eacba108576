"""The weights in what a PyTorch file holds: a state dict, a training checkpoint, a whole module."""

from collections.abc import Mapping
from typing import Any

from suture.checkpoints.checkpoint import Entry
from suture.checkpoints.json_files import is_text
from suture.checkpoints.pickle_calls import Inert, TensorRef, Unsupported
from suture.errors import refusal, shown

#: The keys under which training scripts keep a model's weights.
_WRAPPERS = (
    *("state_dict", "model_state_dict", "model", "module", "net", "network", "params", "weights", "backbone"),
    *("params_ema", "model_ema", "ema", "ema_model", "ema_state_dict", "state_dict_ema", "teacher", "student"),
    *("generator", "discriminator"),
)
_PREFIXES = ("module.", "_orig_mod.")  # DataParallel and torch.compile hold the model as one part of their own
_MOST_PARTS = 200_000  # modules that hold each other in a tangle would give a name for every path through it
_LONGEST_NAME = 2000  # characters
_KINDS_OF_PARTS = ("_parameters", "_buffers", "_modules")
_STATE_DICT = "save the model's state_dict(), or better a safetensors file"


def weights(value: Any, where: object, key: str | None = None) -> Mapping[str, TensorRef]:
    """Name → tensor of the state dict that `value` is or holds.

    `key` chooses one of several models in a file. A wrapper's other entries (epoch, optimizer) are left aside; a flat
    dict must hold tensors and nothing else. Raises `CheckpointError`, also for a file with the weights of several
    models.
    """
    inner, wrapped = _unwrap(value, where, key)
    if _is_script(inner):
        found = _script_tensors(inner, where)
    elif _is_module(inner):
        found = _module_tensors(inner, where)
    elif isinstance(inner, dict):
        found = {n: t for n, t in inner.items() if not (isinstance(n, str) and n.endswith("_extra_state"))}
        if wrapped:
            found = {n: t for n, t in found.items() if isinstance(t, TensorRef | Unsupported)}
    else:
        raise refusal(where, f"holds {_kind(value)}, not a state dict or a module", _STATE_DICT)
    return _checked(found, where)


def without_prefix(entries: dict[str, Entry]) -> tuple[dict[str, Entry], str]:
    """The entries without what DataParallel or torch.compile put before every name, and that prefix.

    >>> without_prefix({"module._orig_mod.a": 1, "module._orig_mod.b": 2})
    ({'a': 1, 'b': 2}, 'module._orig_mod.')
    """
    prefix = ""
    while added := next((p for p in _PREFIXES if entries and all(n.startswith(p) and n != p for n in entries)), ""):
        entries = {name.removeprefix(added): entry for name, entry in entries.items()}
        prefix += added
    return entries, prefix


def _unwrap(value: Any, where: object, key: str | None) -> tuple[Any, bool]:
    wrapped, names = False, []
    for _ in range(4):
        value = _as_dict(value)
        keys = [name for name in _WRAPPERS if isinstance(value, dict) and _holds_weights(value.get(name))]
        if key is not None and isinstance(value, dict) and _holds_weights(value.get(key)):
            keys, key = [key], None
        if len(keys) > 1:
            several = ", ".join(map(repr, keys))
            remedy = f"choose one, such as key={keys[0]}, or save it: torch.save(torch.load(FILE)['{keys[0]}'], NEW)"
            raise refusal(where, f"holds the weights of several models, under {several}", remedy)
        if not keys:
            break
        value, wrapped = value[keys[0]], True
        names = keys
    if key is not None and wrapped:
        raise refusal(where, f"has no weights under key={shown(key)}, only under {', '.join(names)}", "give that key")
    return value, wrapped


def _is_script(value: Any) -> bool:
    """Whether a value is a module of a TorchScript archive."""
    return isinstance(value, Inert) and str(value.name).startswith("__torch__.")


def _script_tensors(module: Inert, where: object) -> dict[str, Any]:
    """The tensors of a TorchScript module and of those in it: parameters, buffers and attributes."""
    found: dict[str, Any] = {}
    waiting: list[tuple[str, Inert, frozenset[int]]] = [("", module, frozenset())]
    parts = 0
    while waiting:
        prefix, current, above = waiting.pop()
        parts += 1 + len(current.state)
        if id(current) in above or len(prefix) > _LONGEST_NAME or parts > _MOST_PARTS:
            raise refusal(where, "holds a module that contains itself or has too many parts", _STATE_DICT)
        for name, part in current.state.items():
            if isinstance(part, TensorRef | Unsupported):
                found[f"{prefix}{name}"] = part
            elif _is_script(part):
                waiting.append((f"{prefix}{name}.", part, above | {id(current)}))
    return found


def _holds_weights(value: Any) -> bool:
    """Whether a value is a module, or a dict with a tensor in it or in a wrapper in it."""
    value = _as_dict(value)
    if _is_module(value):
        return True
    if not isinstance(value, dict):
        return False
    inner = [_as_dict(value.get(key)) for key in _WRAPPERS]
    return any(isinstance(v, TensorRef | Unsupported) for v in value.values()) or any(
        _is_module(part) or (isinstance(part, dict) and any(isinstance(v, TensorRef) for v in part.values()))
        for part in inner
    )


def _as_dict(value: Any) -> Any:
    """The items of an object whose class derives from dict."""
    return value.mapping if isinstance(value, Inert) and value.mapping and not _is_module(value) else value


def _is_module(value: Any) -> bool:
    return isinstance(value, Inert) and all(isinstance(value.state.get(kind), dict) for kind in _KINDS_OF_PARTS)


def _module_tensors(module: Inert, where: object) -> dict[str, Any]:
    """The state dict of a module: parameters and persistent buffers of the module and those in it."""
    found: dict[str, Any] = {}
    waiting: list[tuple[str, Inert, frozenset[int]]] = [("", module, frozenset())]
    parts = 0  # modules without a tensor count too: a tangle of those has paths without end and not one name
    while waiting:
        prefix, current, above = waiting.pop()
        transient = current.state.get("_non_persistent_buffers_set")
        transient = transient if isinstance(transient, set) else frozenset()
        parts += 1 + sum(map(len, (transient, *(current.state[kind] for kind in _KINDS_OF_PARTS))))
        if id(current) in above or len(prefix) > _LONGEST_NAME or parts > _MOST_PARTS:
            raise refusal(where, "holds a module that contains itself or has too many parts", _STATE_DICT)
        for part in ("_parameters", "_buffers"):
            own = {str(n): t for n, t in current.state[part].items() if t is not None and n not in transient}
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
        names = ", ".join(map(shown, list(found)[:5])) or "nothing"
        raise refusal(where, f"holds no tensors, only: {names}", _STATE_DICT)
    for name, tensor in found.items():
        if not isinstance(name, str):
            raise refusal(where, f"has the key {shown(name)}, which is {_kind(name)} and no name", _STATE_DICT)
        if not is_text(name):
            raise refusal(where, f"has the name {shown(name)!r}, which is not valid Unicode", "rename the tensor")
        if isinstance(tensor, Unsupported):
            raise refusal(where, f"holds {tensor.kind} under {shown(name)!r}", _STATE_DICT)
        if not isinstance(tensor, TensorRef):
            raise refusal(where, f"holds {_kind(tensor)}, not a tensor, under {shown(name)!r}", _STATE_DICT)
    return found


def _kind(value: Any) -> str:
    if isinstance(value, Inert):
        return f"an object of {value.name}"
    return "a tensor" if isinstance(value, TensorRef | Unsupported) else f"an object of {type(value).__name__}"
