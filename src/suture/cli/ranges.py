"""The values that a knob may have, from its type, in words."""

from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt

from suture.core.knobs import Knobs

_KINDS: dict[Any, str] = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    NoneType: "null",
    list: "list",
    tuple: "list",
    Sequence: "list",
    dict: "mapping",
    Mapping: "mapping",
}


def ranges(knobs: Knobs) -> dict[str, str]:
    """Knob → what it may be, from its type.

    >>> def scale(*, factor: Annotated[float, Gt(0)] = 0.3, mode: Literal["sum", "mean"] | None = None): ...
    >>> ranges(Knobs("scale", scale))
    {'factor': 'number greater than 0', 'mode': 'sum, mean or null'}
    """
    return {knob: _or(_range(annotation)) for knob, annotation in knobs.annotations.items()}


def _range(annotation: Any) -> list[str]:
    """The alternatives that a type allows."""
    if get_origin(annotation) is Annotated:
        kind, *bounds = get_args(annotation)
        return [" ".join([_or(_range(kind)), " and ".join(filter(None, map(_bound, bounds)))]).strip()]
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    if get_origin(annotation) in (Union, UnionType):
        return [alternative for part in get_args(annotation) for alternative in _range(part)]
    return [_KINDS.get(get_origin(annotation) or annotation, getattr(annotation, "__name__", str(annotation)))]


def _bound(bound: Any) -> str:
    limits = ((Gt, "greater than"), (Ge, "at least"), (Lt, "less than"), (Le, "at most"))
    return next(
        (f"{text} {getattr(bound, kind.__name__.lower())}" for kind, text in limits if isinstance(bound, kind)), ""
    )


def _or(alternatives: Sequence[str]) -> str:
    *others, last = alternatives
    return f"{', '.join(others)} or {last}" if others else last


def named_values(annotation: Any) -> tuple[str, ...]:
    """The values that a type allows, where it names them all."""
    if annotation is bool:
        return ("true", "false")
    if get_origin(annotation) is Literal:
        return tuple(map(str, get_args(annotation)))
    return ()
