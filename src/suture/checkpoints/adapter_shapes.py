"""Shapes of an adapter's tensors against those of its base, by kind of adapter, and which weights are (in, out)."""

import math
from collections.abc import Callable, Mapping

from suture.checkpoints.adapter_configs import (
    MERGE_FIRST,
    is_conv1d,
    is_feedforward,
    may_be_conv1d,
    rank_of,
    token_rows,
)
from suture.checkpoints.adapter_tensors import Adapter, expert_fits, is_stack
from suture.core.names import short
from suture.errors import shown


def check_parts(adapter: Adapter) -> None:
    """Refuse parts that are missing or of shapes that do not fit, and find out which weights are (in, out)."""
    for module, parts in adapter.modules.items():
        sides = {"lora_A", "lora_B"} & set(parts)
        if adapter.kind == "LORA" and len(sides) == 1:
            found = f"has only one of the two factors of '{shown(module)}.weight'"
            raise adapter.refuse(found, "copy the adapter again")
        dora = bool(adapter.config.get("use_dora"))
        low_rank = sides or "lora_embedding_A" in parts
        if adapter.kind == "LORA" and low_rank and dora != ("lora_magnitude_vector" in parts):
            found = f"has {'no' if dora else 'a'} lora_magnitude_vector for '{shown(module)}', with use_dora={dora}"
            raise adapter.refuse(found, "copy or download weights and configuration together")
        dtypes = [adapter.spec(adapter.tensor(module)).dtype, *(adapter.weights.specs[n].dtype for n in parts.values())]
        if not all(dtype.is_floating_point for dtype in dtypes):
            found = f"adapts '{shown(module)}' of {short(dtypes[0])} by tensors of {', '.join(map(short, dtypes[1:]))}"
            raise adapter.refuse(found, "give base and adapter in a floating-point dtype")
    _find_turned(adapter)


def _find_turned(adapter: Adapter) -> None:
    """Which weights are (in, out), as those of a Conv1D, so that an update has to be transposed.

    `fan_in_fan_out` does not say: peft sets it anew for each module and stores what it was for the last. The shapes do,
    but for square weights. Of those the base's configuration says; without one they are Linear, if nothing hints at a
    Conv1D.
    """
    fits = {module: _fits(adapter, module) for module in adapter.modules}
    hints = adapter.config.get("fan_in_fan_out") or (False, True) in fits.values() or any(map(may_be_conv1d, fits))
    for module, (straight, transposed) in fits.items():
        expert = is_stack(adapter, module)
        known = transposed
        if straight and transposed:
            known = None if expert else is_conv1d(adapter.base.directory, module)
        if known is None and (hints or expert):
            either = "out × in or in × out" if expert else "a Linear or a Conv1D"
            found = f"adapts the square '{shown(adapter.tensor(module))}', which may be {either}"
            remedy = MERGE_FIRST if expert else "give the base as a model directory with its config.json"
            raise adapter.refuse(found, remedy)
        adapter.turned[module] = bool(known)


def _fits(adapter: Adapter, module: str) -> tuple[bool, bool]:
    """Whether a module's update has the shape of its weight, and whether its transpose has; refuses if neither fits."""
    name = adapter.tensor(module)
    shape = adapter.spec(name).shape
    shapes = {part: adapter.weights.specs[stored].shape for part, stored in adapter.modules[module].items()}
    fits = _SHAPES[adapter.kind](adapter, module, shape, shapes)
    if not any(fits):
        listed = ", ".join(f"{part} {tuple(size)}" for part, size in sorted(shapes.items()))
        problem = f"has {listed} for '{shown(name)}' of shape {shape}"
        if len(shape) > 2 and len(shapes) == 2 and shapes.get("lora_B", (0, 0))[1] != shapes.get("lora_A", (0,))[0]:
            raise adapter.refuse(f"{problem}, as for a convolution in groups, which is not read", MERGE_FIRST)
        raise adapter.refuse(problem, "give the base it was trained on")
    return fits


Shape = tuple[int, ...]


def _either(shape: Shape, rows: int, columns: int) -> tuple[bool, bool]:
    """Whether (rows, columns) is the shape of a weight, and whether it is the transpose's."""
    if len(shape) < 2:
        return False, False
    return (rows, columns) == (shape[0], math.prod(shape[1:])), (columns, rows) == shape


def _lora_fits(adapter: Adapter, module: str, shape: Shape, shapes: Mapping[str, Shape]) -> tuple[bool, bool]:
    if "trainable_tokens_delta" in shapes:
        return _tokens_fit(adapter, module, shape, shapes)
    if "lora_embedding_A" in shapes:
        up, down = shapes["lora_embedding_A"][::-1], shapes["lora_embedding_B"][::-1]
        return _either(shape, up[0], down[-1])[0] and up[1] == down[0], False
    if "lora_A" not in shapes:
        return False, False
    if module in adapter.parameters:
        return expert_fits(adapter, module, adapter.parameters[module])
    up, down = shapes["lora_B"], shapes["lora_A"]
    if min(len(shape), len(up), len(down)) < 2 or up[1] != down[0]:
        return False, False
    fits = _either(shape, up[0], math.prod(down[1:]))
    if any(fits) and up[1] != rank_of(adapter.config, module):
        problem = f"has factors of rank {up[1]} for '{shown(module)}', {rank_of(adapter.config, module)} in its"
        raise adapter.refuse(f"{problem} configuration", "copy or download weights and configuration together")
    return fits


def _ia3_fits(adapter: Adapter, module: str, shape: Shape, shapes: Mapping[str, Shape]) -> tuple[bool, bool]:
    count, forward = math.prod(shapes["ia3_l"]), is_feedforward(adapter.config, module)
    if len(shape) < 2:
        return False, False
    return count == shape[1 if forward else 0], len(shape) == 2 and count == shape[0 if forward else 1]


def _loha_fits(adapter: Adapter, module: str, shape: Shape, shapes: Mapping[str, Shape]) -> tuple[bool, bool]:
    if not {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} <= shapes.keys():
        return False, False
    first, second = (
        _loha_shape(*(shapes.get(f"hada_{part}") for part in (f"w{n}_a", f"w{n}_b", f"t{n}"))) for n in (1, 2)
    )
    return first == second and first == (shape[0], math.prod(shape[1:])), False


def _loha_shape(left: Shape | None, right: Shape | None, core: Shape | None) -> Shape | None:
    if left is None or right is None or len(left) != 2 or len(right) != 2:
        return None
    if core is None:
        return (left[0], right[1]) if left[1] == right[0] else None
    fits = len(core) == 4 and core[:2] == (left[0], right[0])
    return (left[1], right[1] * core[2] * core[3]) if fits else None


def _lokr_fits(adapter: Adapter, module: str, shape: Shape, shapes: Mapping[str, Shape]) -> tuple[bool, bool]:
    first, second = (_lokr_shape(shapes, number) for number in "12")
    if first is None or second is None or len(first) != 2:
        return False, False
    return (first[0] * second[0], first[1] * math.prod(second[1:])) == (shape[0], math.prod(shape[1:])), False


def _lokr_shape(shapes: Mapping[str, Shape], number: str) -> Shape | None:
    whole = shapes.get(f"lokr_w{number}")
    left, right = shapes.get(f"lokr_w{number}_a"), shapes.get(f"lokr_w{number}_b")
    core = shapes.get(f"lokr_t{number}")
    if whole is not None or left is None or right is None or len(left) != 2 or len(right) != 2:
        return whole if whole is None or len(whole) >= 2 else None
    if core is None:
        return (left[0], right[1]) if left[1] == right[0] else None
    fits = len(core) == 4 and core[:2] == (left[0], right[0])
    return (left[1], right[1], core[2], core[3]) if fits else None


def _vera_fits(adapter: Adapter, module: str, shape: Shape, shapes: Mapping[str, Shape]) -> tuple[bool, bool]:
    rank = int(adapter.config["r"])
    if shapes.get("vera_lambda_d") != (rank,) or len(shapes.get("vera_lambda_b", ())) != 1 or len(shape) != 2:
        return False, False
    return shapes["vera_lambda_b"] == (shape[0],), shapes["vera_lambda_b"] == (shape[1],)


def _tokens_fit(adapter: Adapter, module: str, shape: Shape, shapes: Mapping[str, Shape]) -> tuple[bool, bool]:
    trained, rows = shapes["trainable_tokens_delta"], token_rows(adapter.config, module)
    if rows is None or len(shape) != 2 or trained != (len(rows), shape[1]):
        return False, False
    return max(rows, default=0) < shape[0], False


_SHAPES: dict[str, Callable[[Adapter, str, Shape, Mapping[str, Shape]], tuple[bool, bool]]] = {
    "LORA": _lora_fits,
    "IA3": _ia3_fits,
    "LOHA": _loha_fits,
    "LOKR": _lokr_fits,
    "VERA": _vera_fits,
    "TRAINABLE_TOKENS": _tokens_fit,
    "LN_TUNING": lambda adapter, module, shape, shapes: (False, False),
}
