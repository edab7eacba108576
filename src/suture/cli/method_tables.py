"""The methods and their knobs, for people at a terminal."""

from collections.abc import Iterable
from itertools import groupby
from typing import Any

from rich.console import Console

from suture.cli.catalogue import MethodEntry

_WIDEST = 19  # letters of a name before the summaries, which begin in one column
_KINDS = {
    ("method", False): "From weights alone, as method=NAME:",
    ("method", True): "From weights and unlabelled inputs (taskpool=…), as method=NAME:",
    ("repair", True): "Repairs of a merge, from unlabelled inputs (taskpool=…), as repair=NAME:",
}


def print_lines(methods: Iterable[MethodEntry]) -> None:
    """Every method and repair in one line, under its kind; cut at a terminal's width, whole elsewhere."""
    console = Console(highlight=False)
    cut: dict[str, Any] = {"no_wrap": True, "overflow": "ellipsis"} if console.is_terminal else {"soft_wrap": True}
    for kind, of_kind in groupby(sorted(methods, key=_rank), key=_kind):
        console.print(_KINDS[kind], style="bold", **cut)
        for method in of_kind:
            console.print(f"  {method.name:<{_WIDEST}}  {method.summary}", markup=False, **cut)
        console.print()
    console.print("`suture methods NAME` explains one; `suture methods --all` has every knob of each.", soft_wrap=True)


def _kind(method: MethodEntry) -> tuple[str, bool]:
    return method.group, method.inputs


def _rank(method: MethodEntry) -> int:
    return list(_KINDS).index(_kind(method))


def print_methods(methods: Iterable[MethodEntry]) -> None:
    """Every method and repair with its knobs, defaults, aliases and paper."""
    console = Console(soft_wrap=True, highlight=False)
    for method in methods:
        console.print(f"{_named(method)}: {method.summary}")
        for name, knob in method.knobs.items():
            console.print(f"    {method.group}.{name}={_typed(knob.default)}", markup=False)
        console.print(f"    {method.paper}")
    console.print("\n`suture methods NAME` explains one and its knobs.")


def print_method(method: MethodEntry) -> None:
    """One method or repair: what it does, each knob with its default and range, and its paper."""
    console = Console(soft_wrap=True, highlight=False)
    console.print(_named(method))
    console.print(f"\n{method.description}\n", markup=False)
    knobs = {f"{method.group}.{name}={_typed(knob.default)}": knob.range for name, knob in method.knobs.items()}
    width = min(38, max(map(len, knobs), default=0))
    for typed, allowed in knobs.items():
        console.print(f"  {typed:<{width}}  {allowed}", markup=False)
    console.print(f"\n{method.paper}" if knobs else f"It has no knobs.\n\n{method.paper}")


def _named(method: MethodEntry) -> str:
    aliases = f" (also {', '.join(method.aliases)})" if method.aliases else ""
    group = "" if method.group == "method" else f"{method.group}="
    return f"[bold]{group}{method.name}[/bold]{aliases}"


def _typed(default: Any) -> str:
    """A default as it is typed on the command line."""
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return str(list(default)) if isinstance(default, tuple) else str(default)
